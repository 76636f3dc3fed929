//! The Lambda function of [`hail_emr::build_ami`].

use hail_emr::build_ami::BuildAmi;
use hail_emr::custom_resource::run;

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<(), lambda_runtime::Error> {
    run(BuildAmi::connect).await
}
