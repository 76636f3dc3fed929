//! `Custom::BucketRemoval` in hail-s3: empties and deletes the stack's buckets when the stack goes, if that was asked
//! for.
//!
//! | | |
//! |---|---|
//! | properties | `Buckets`, those that go with the stack: none unless its `RemoveBuckets` says so, and never one that was there before; `LastWait` |
//! | Data | none |
//! | Create, Update | nothing: a bucket that is not named any more stays |
//! | Delete | removes every version of every object of those buckets, and then the buckets |
//! | replacement | never, so that no update removes a bucket |
//!
//! The template keeps the buckets (`DeletionPolicy` cannot depend on a parameter), so that what is removed is decided
//! in one place, by the properties of the last update that succeeded.
//!
//! A Delete works for [`AT_A_STRETCH`] at a time: what is left then is the work of the next tick. There is nothing to
//! remember, since what is removed is gone, and two stretches at once do no harm. CloudFormation waits an hour for one
//! resource, so the template has a chain of them: each but the last leaves what it could not do to the next. For what
//! even the last has not done the buckets get a life cycle that lets S3 remove everything by itself, and deleting the
//! stack again goes on.
//!
//! Per hour that is some ten million versions: S3 takes 3,500 deletions a second for a prefix and more where there
//! are several (S3 user guide, "Best practices design patterns: optimizing Amazon S3 performance"), and lists them a
//! thousand at a time.

use crate::custom_resource::{Answer, Progress, Provider, Resource, hex_digest, read_properties, scalar};
use crate::failure::Failure;
use aws_config::SdkConfig;
use aws_sdk_s3::Client;
use aws_sdk_s3::operation::list_object_versions::ListObjectVersionsOutput;
use aws_sdk_s3::types::{
    AbortIncompleteMultipartUpload, BucketLifecycleConfiguration, Delete, ExpirationStatus, LifecycleExpiration,
    LifecycleRule, LifecycleRuleFilter, NoncurrentVersionExpiration, ObjectIdentifier,
};
use futures_util::{StreamExt, TryStreamExt, stream};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use std::cell::Cell;
use std::time::Duration;
use tokio::time::Instant;
use tracing::{info, warn};

/// How long one invocation works before it leaves the rest to the next tick, which comes every minute. Twice as long
/// is well below the function's own limit: a request is looked at once more after it was put down.
const AT_A_STRETCH: Duration = Duration::from_secs(45);

/// Requests under way at once for a bucket. Each is about a thousand versions, and S3 counts every one of them.
const CONCURRENCY: usize = 8;

/// How S3 says that there is no such bucket.
const BUCKET_IS_GONE: &str = "NoSuchBucket";

/// See the module.
pub struct RemoveBuckets {
    s3: Client,
}

/// What the template says.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct Properties {
    #[serde(default)]
    buckets: Vec<String>,
    #[serde(default, deserialize_with = "scalar")]
    last_wait: bool,
}

/// What is left to do.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct Awaited {
    /// The name of the waiting request: each of a chain has its own.
    key: String,
    /// Those that are still there.
    buckets: Vec<String>,
    /// Versions that were removed so far.
    removed: u64,
    last_wait: bool,
}

/// One invocation's share of the work.
struct Stretch {
    until: Instant,
    removed: Cell<u64>,
}

impl Stretch {
    fn is_over(&self) -> bool {
        Instant::now() >= self.until
    }
}

impl RemoveBuckets {
    /// With the function's own credentials.
    pub fn connect(aws: &SdkConfig) -> Self {
        Self { s3: Client::new(aws) }
    }

    /// Empties a bucket and deletes it, as far as there is time. Says whether it is gone.
    async fn remove(&self, bucket: &str, stretch: &Stretch) -> Result<bool, Failure> {
        loop {
            let before = stretch.removed.get();
            self.remove_versions(bucket, stretch).await?;
            let all_aborted = self.abort_uploads(bucket).await?;
            if stretch.is_over() {
                return Ok(false);
            }
            let deleted = self.s3.delete_bucket().bucket(bucket).send().await;
            match deleted.map_err(|error| Failure::aws(format!("deleting bucket {bucket}"), error)) {
                // Somebody wrote meanwhile, or S3 was too busy for some. Where nothing could be removed at all the
                // next tick is soon enough.
                Err(failure) if failure.is(&["BucketNotEmpty"]) => {
                    if all_aborted && stretch.removed.get() == before {
                        return Ok(false);
                    }
                }
                deleted => return deleted.map(|_| true),
            }
        }
    }

    async fn remove_versions(&self, bucket: &str, stretch: &Stretch) -> Result<(), Failure> {
        let doing = &format!("listing the object versions of bucket {bucket}");
        let pages = stream::try_unfold(Some((None, None)), |from| async move {
            let Some((key, version)) = from.filter(|_| !stretch.is_over()) else { return Ok(None) };
            let page = self.s3.list_object_versions().bucket(bucket).set_key_marker(key).set_version_id_marker(version);
            let page = page.send().await.map_err(|error| Failure::aws(doing, error))?;
            let next = (page.next_key_marker.clone(), page.next_version_id_marker.clone());
            let next = page.is_truncated.unwrap_or_default().then_some(next);
            Ok(Some((page, next)))
        });
        pages
            .map_ok(|page| self.delete_versions(bucket, page, stretch))
            .try_buffer_unordered(CONCURRENCY)
            .try_collect()
            .await
    }

    /// Deletes a page of versions. What S3 is too busy for stays and is found again.
    async fn delete_versions(
        &self,
        bucket: &str,
        page: ListObjectVersionsOutput,
        stretch: &Stretch,
    ) -> Result<(), Failure> {
        let versions = page.versions.unwrap_or_default().into_iter().map(|there| (there.key, there.version_id));
        let markers = page.delete_markers.unwrap_or_default().into_iter().map(|there| (there.key, there.version_id));
        let all: Vec<_> = versions.chain(markers).collect();
        if all.is_empty() {
            return Ok(());
        }
        let doing = || format!("removing {} object versions of bucket {bucket}", all.len());
        let defect = |why| Failure::new(format!("{} failed: {why}", doing()));
        let identifiers: Result<_, _> = all
            .iter()
            .map(|(key, version)| {
                ObjectIdentifier::builder().set_key(key.clone()).set_version_id(version.clone()).build()
            })
            .collect();
        let delete = Delete::builder().set_objects(Some(identifiers.map_err(defect)?)).quiet(true).build();
        let answer = self.s3.delete_objects().bucket(bucket).delete(delete.map_err(defect)?).send().await;
        let errors = answer.map_err(|error| Failure::aws(doing(), error))?.errors.unwrap_or_default();
        stretch.removed.set(stretch.removed.get() + (all.len() - errors.len()) as u64);
        let refusal = errors.iter().map(|error| {
            let object = format!("removing s3://{bucket}/{}", error.key().unwrap_or_default());
            Failure::answered(object, error.code(), error.message())
        });
        match refusal.into_iter().find(|failure| !failure.transient) {
            Some(refused) => Err(Failure {
                reason: format!(
                    "{}, as for {} more of {} versions. Take away what forbids it and delete the stack again, or \
                     delete it and retain this resource",
                    refused.reason,
                    errors.len() - 1,
                    all.len()
                ),
                ..refused
            }),
            None => Ok(()),
        }
    }

    /// Ends a thousand unfinished uploads at most; says whether there were no more. Whoever uploads could otherwise
    /// still finish one of them.
    async fn abort_uploads(&self, bucket: &str) -> Result<bool, Failure> {
        let page = self.s3.list_multipart_uploads().bucket(bucket).send().await;
        let page = page.map_err(|error| Failure::aws(format!("listing the uploads to bucket {bucket}"), error))?;
        let uploads = stream::iter(page.uploads.unwrap_or_default()).map(|upload| async move {
            let doing = format!("ending an upload of s3://{bucket}/{}", upload.key().unwrap_or_default());
            let request = self.s3.abort_multipart_upload().bucket(bucket).set_key(upload.key);
            match request.set_upload_id(upload.upload_id).send().await.map_err(|error| Failure::aws(doing, error)) {
                Err(failure) if failure.is(&["NoSuchUpload"]) => Ok(()),
                aborted => aborted.map(|_| ()),
            }
        });
        uploads.buffer_unordered(CONCURRENCY).try_collect::<()>().await?;
        Ok(!page.is_truncated.unwrap_or_default())
    }

    /// Lets S3 remove everything by itself, within days: for what nobody waits for any more.
    async fn let_expire(&self, bucket: &str) -> Result<(), Failure> {
        let doing = || format!("giving bucket {bucket} a life cycle that removes everything");
        let rule = |id: &str, expires: LifecycleExpiration| {
            LifecycleRule::builder()
                .id(id)
                .status(ExpirationStatus::Enabled)
                .filter(LifecycleRuleFilter::builder().prefix("").build())
                .expiration(expires)
        };
        let rules = [
            rule("RemoveEverything", LifecycleExpiration::builder().days(1).build())
                .noncurrent_version_expiration(NoncurrentVersionExpiration::builder().noncurrent_days(1).build())
                .abort_incomplete_multipart_upload(
                    AbortIncompleteMultipartUpload::builder().days_after_initiation(1).build(),
                )
                .build(),
            // A rule of its own: S3 takes an expiry in days and the removal of delete markers only from two rules.
            rule("RemoveDeleteMarkers", LifecycleExpiration::builder().expired_object_delete_marker(true).build())
                .build(),
        ];
        let defect = |why| Failure::new(format!("{} failed: {why}", doing()));
        let rules = rules.into_iter().collect::<Result<_, _>>().map_err(defect)?;
        let rules = BucketLifecycleConfiguration::builder().set_rules(Some(rules)).build().map_err(defect)?;
        let put = self.s3.put_bucket_lifecycle_configuration().bucket(bucket).lifecycle_configuration(rules);
        put.send().await.map(|_| ()).map_err(|error| Failure::aws(doing(), error))
    }
}

impl Provider for RemoveBuckets {
    type Properties = Properties;
    type Data = ();
    type Awaited = Awaited;

    fn read(&self, _: &str, properties: Value) -> Result<Properties, String> {
        read_properties(properties)
    }

    async fn create(&self, _: &Resource, _: Properties) -> Result<Answer<Self>, Failure> {
        Ok(Answer::Now(()))
    }

    async fn update(&self, _: &Resource, _: Properties, _: Option<Properties>) -> Result<Answer<Self>, Failure> {
        Ok(Answer::Now(()))
    }

    async fn delete(&self, _: &Resource, old: Properties) -> Result<(), Failure> {
        let given = stream::iter(&old.buckets).map(|bucket| async move {
            match self.let_expire(bucket).await {
                Err(failure) if failure.is(&[BUCKET_IS_GONE]) => Ok(()),
                Err(failure) if failure.transient => {
                    warn!(why = failure.reason, bucket, "the next resource of the chain tries it again");
                    Ok(())
                }
                given => given,
            }
        });
        given.buffer_unordered(CONCURRENCY).try_collect().await
    }

    fn rest_of_delete(&self, resource: &Resource, old: &Properties) -> Option<Awaited> {
        (!old.buckets.is_empty()).then(|| Awaited {
            key: hex_digest([resource.physical_id.as_str()])[..32].to_owned(),
            buckets: old.buckets.clone(),
            removed: 0,
            last_wait: old.last_wait,
        })
    }

    fn key(&self, awaited: &Awaited) -> String {
        awaited.key.clone()
    }

    async fn poll(&self, awaited: &Awaited) -> Result<Progress<Self>, Failure> {
        let stretch = &Stretch { until: Instant::now() + AT_A_STRETCH, removed: Cell::new(0) };
        let work = stream::iter(&awaited.buckets).map(|bucket| async move {
            let gone = match self.remove(bucket, stretch).await {
                Err(failure) if failure.is(&[BUCKET_IS_GONE]) => true,
                // What was removed so far counts all the same.
                Err(failure) if failure.transient => {
                    warn!(why = failure.reason, bucket, "the next tick goes on");
                    false
                }
                gone => gone?,
            };
            Ok((!gone).then(|| bucket.clone()))
        });
        let left: Vec<_> = work.buffered(CONCURRENCY).collect().await;
        let removed = awaited.removed + stretch.removed.get();
        let left: Vec<String> = left.into_iter().collect::<Result<Vec<_>, _>>()?.into_iter().flatten().collect();
        info!(removed, still_there = left.join(", "), "object versions were removed");
        if left.is_empty() {
            return Ok(Progress::Ready(()));
        }
        Ok(Progress::Waiting(Awaited {
            key: awaited.key.clone(),
            buckets: left,
            removed,
            last_wait: awaited.last_wait,
        }))
    }

    fn gave_up(&self, awaited: &Awaited) -> Result<(), Failure> {
        if !awaited.last_wait {
            return Ok(()); // The next resource of the chain goes on.
        }
        Err(Failure::new(format!(
            "bucket {} is not empty after all the time that the stack waits; {} object versions were removed in the \
             last hour. Delete the stack again to go on with it, now or in some days: S3 removes the rest by itself \
             meanwhile",
            awaited.buckets.join(" and bucket "),
            awaited.removed
        )))
    }
}
