//! The Lambda function of [`hail_emr::remove_buckets`].

use hail_emr::custom_resource::run;
use hail_emr::remove_buckets::RemoveBuckets;

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<(), lambda_runtime::Error> {
    run(RemoveBuckets::connect).await
}
