//! The Lambda function of [`hail_emr::seed_buckets`].

use hail_emr::custom_resource::run;
use hail_emr::seed_buckets::SeedBuckets;

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<(), lambda_runtime::Error> {
    run(SeedBuckets::connect).await
}
