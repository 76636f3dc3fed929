//! The Lambda function of [`hail_emr::add_plot_steps`].

use hail_emr::add_plot_steps::AddPlotSteps;
use hail_emr::custom_resource::run;

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<(), lambda_runtime::Error> {
    run(AddPlotSteps::connect).await
}
