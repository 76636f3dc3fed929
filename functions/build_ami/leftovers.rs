//! What a build that was cut off leaves behind, and nobody else would remove.
//!
//! Packer cleans up after itself when it fails. A build that is stopped, or that has used up its time, ends with
//! Packer's process, and what Packer had made stays: above all an instance, which costs money by the hour. All of it has
//! a `Name` that begins with `packer ` and the tags `build-project` and `build-id` (`run_tags` in
//! `packer/hail.pkr.hcl`); a finished AMI has a name of its own.

use crate::failure::Failure;
use aws_config::SdkConfig;
use aws_sdk_ec2::types::{Filter, InstanceStateName};
use tracing::warn;

/// The tag of everything that a project's builds make.
pub const OF_PROJECT: &str = "build-project";

/// The tag of everything that one build makes.
pub const OF_BUILD: &str = "build-id";

/// What the names of all things begin with that Packer makes for its own use.
const PACKERS_OWN: &str = "packer *";

/// See the module.
pub struct Leftovers {
    ec2: aws_sdk_ec2::Client,
}

impl Leftovers {
    /// With the function's own credentials.
    pub fn connect(aws: &SdkConfig) -> Self {
        Self { ec2: aws_sdk_ec2::Client::new(aws) }
    }

    /// Removes what has this tag, as far as that can be done now; says whether nothing is left. An instance takes a
    /// minute to end, and its security group can go only after it.
    pub async fn remove(&self, tag: &str, value: &str) -> Result<bool, Failure> {
        let filters = || {
            let named = Filter::builder().name("tag:Name").values(PACKERS_OWN).build();
            Some(vec![named, Filter::builder().name(format!("tag:{tag}")).values(value).build()])
        };
        let doing = |what: &str| format!("looking for the {what} that builds with the tag {tag} {value} left");
        let mut left = false;

        let found = self.ec2.describe_instances().set_filters(filters()).send().await;
        let found = found.map_err(|error| Failure::aws(doing("instances"), error))?;
        for instance in found.reservations().iter().flat_map(|reservation| reservation.instances()) {
            let id = instance.instance_id().unwrap_or_default();
            match instance.state().and_then(|state| state.name()) {
                Some(InstanceStateName::Terminated) => continue,
                Some(InstanceStateName::ShuttingDown) => {}
                _ => {
                    warn!(id, "terminating an instance that a build left");
                    let ended = self.ec2.terminate_instances().instance_ids(id).send().await;
                    ended.map_err(|error| Failure::aws(format!("terminating instance {id}"), error))?;
                }
            }
            left = true;
        }

        let found = self.ec2.describe_images().owners("self").set_filters(filters()).send().await;
        for image in found.map_err(|error| Failure::aws(doing("images"), error))?.images() {
            let id = image.image_id().unwrap_or_default();
            warn!(id, "deregistering an image that a build left");
            let gone = self.ec2.deregister_image().image_id(id).delete_associated_snapshots(true).send().await;
            gone.map_err(|error| Failure::aws(format!("deregistering image {id}"), error))?;
        }

        let found = self.ec2.describe_key_pairs().set_filters(filters()).send().await;
        for key_pair in found.map_err(|error| Failure::aws(doing("key pairs"), error))?.key_pairs() {
            let name = key_pair.key_name().unwrap_or_default();
            let gone = self.ec2.delete_key_pair().key_name(name).send().await;
            gone.map_err(|error| Failure::aws(format!("deleting key pair {name}"), error))?;
        }

        let found = self.ec2.describe_security_groups().set_filters(filters()).send().await;
        for group in found.map_err(|error| Failure::aws(doing("security groups"), error))?.security_groups() {
            let id = group.group_id().unwrap_or_default();
            let gone = self.ec2.delete_security_group().group_id(id).send().await;
            match gone.map_err(|error| Failure::aws(format!("deleting security group {id}"), error)) {
                Err(failure) if failure.is(&["DependencyViolation"]) => left = true,
                Err(failure) if failure.is(&["InvalidGroup.NotFound"]) => {}
                gone => gone.map(|_| ())?,
            }
        }
        Ok(!left)
    }
}
