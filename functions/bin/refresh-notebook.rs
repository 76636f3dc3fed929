//! The Lambda function of [`hail_emr::refresh_notebook`].

use hail_emr::custom_resource::run;
use hail_emr::refresh_notebook::RefreshNotebook;

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<(), lambda_runtime::Error> {
    run(RefreshNotebook::connect).await
}
