//! The AMIs of a build project: published in Parameter Store, looked after, deregistered.
//!
//! The Packer build tags an AMI and its snapshots with the project (`build-project`), which is how they are found
//! and what the function's permission to remove them rests on.

use crate::failure::Failure;
use aws_config::SdkConfig;
use aws_sdk_ec2::types::{Filter, Tag};
use aws_sdk_emr::types::ClusterState;
use aws_sdk_ssm::types::ParameterType;
use serde::Serialize;
use tracing::{info, warn};

/// Where the newest AMI's id is published.
pub const LATEST: &str = "/hail/ami/latest";

/// The tag that names the project of an AMI.
const PROJECT_TAG: &str = "tag:build-project";

/// How SSM says that there is no such parameter.
const PARAMETER_IS_GONE: &str = "ParameterNotFound";

/// States of a cluster that may still ask for nodes, which are made from its AMI.
const ALIVE: [ClusterState; 4] =
    [ClusterState::Starting, ClusterState::Bootstrapping, ClusterState::Running, ClusterState::Waiting];

/// What a successful build hands out.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "PascalCase")]
pub struct Ami {
    /// `ami-...`
    pub ami_id: String,
    /// Its unique name, with the date and the build in it.
    pub ami_name: String,
}

impl Ami {
    /// The parameter that bears its name.
    pub fn parameter(&self) -> String {
        format!("/hail/ami/{}", self.ami_name)
    }
}

/// EC2, Parameter Store, and those who may be using an AMI.
pub struct Amis {
    cloudformation: aws_sdk_cloudformation::Client,
    ec2: aws_sdk_ec2::Client,
    emr: aws_sdk_emr::Client,
    ssm: aws_sdk_ssm::Client,
}

impl Amis {
    /// With the function's own credentials.
    pub fn connect(aws: &SdkConfig) -> Self {
        Self {
            cloudformation: aws_sdk_cloudformation::Client::new(aws),
            ec2: aws_sdk_ec2::Client::new(aws),
            emr: aws_sdk_emr::Client::new(aws),
            ssm: aws_sdk_ssm::Client::new(aws),
        }
    }

    /// Whether nobody has deregistered the AMI.
    pub async fn exists(&self, ami: &Ami) -> Result<bool, Failure> {
        let found = self.ec2.describe_images().image_ids(&ami.ami_id).send().await;
        match found.map_err(|error| Failure::aws(format!("looking for AMI {}", ami.ami_id), error)) {
            Err(failure) if failure.is(&["InvalidAMIID.NotFound", "InvalidAMIID.Unavailable"]) => Ok(false),
            found => Ok(!found?.images.unwrap_or_default().is_empty()),
        }
    }

    /// All AMIs of a project that are registered, the newest first.
    pub async fn of_project(&self, project: &str) -> Result<Vec<Ami>, Failure> {
        let filter = Filter::builder().name(PROJECT_TAG).values(project).build();
        let mut pages = self.ec2.describe_images().owners("self").filters(filter).into_paginator().send();
        let mut images = Vec::new();
        while let Some(page) = pages.next().await {
            let page =
                page.map_err(|error| Failure::aws(format!("looking for the AMIs of project {project}"), error))?;
            images.extend(page.images.unwrap_or_default());
        }
        // ISO 8601, which sorts as text.
        images.sort_by(|one, other| other.creation_date.cmp(&one.creation_date));
        // One that Packer is not done with has not got its own name yet.
        let is_done =
            |tags: &[Tag]| !tags.iter().any(|tag| tag.value().is_some_and(|name| name.starts_with("packer ")));
        images.retain(|image| is_done(image.tags()));
        let amis = images.into_iter().map(|image| Some(Ami { ami_id: image.image_id?, ami_name: image.name? }));
        Ok(amis.flatten().collect())
    }

    /// Publishes an AMI as the latest where it is, and under its name, which says that it has been published.
    pub async fn publish(&self, ami: &Ami, is_latest: bool) -> Result<(), Failure> {
        if is_latest {
            self.put_parameter(LATEST, &ami.ami_id).await?;
        }
        self.put_parameter(&ami.parameter(), &ami.ami_id).await
    }

    async fn put_parameter(&self, name: &str, ami_id: &str) -> Result<(), Failure> {
        // Every resource of the chain gets here, and an event besides.
        if self.parameter(name).await?.as_deref() == Some(ami_id) {
            return Ok(());
        }
        self.ssm
            .put_parameter()
            .name(name)
            .value(ami_id)
            .r#type(ParameterType::String)
            .data_type("aws:ec2:image")
            .overwrite(true)
            .send()
            .await
            .map(|_| ())
            .map_err(|error| Failure::aws(format!("publishing AMI {ami_id} as parameter {name}"), error))
    }

    /// The AMI that is published under a name.
    pub async fn parameter(&self, name: &str) -> Result<Option<String>, Failure> {
        let there = self.ssm.get_parameter().name(name).send().await;
        match there.map_err(|error| Failure::aws(format!("reading parameter {name}"), error)) {
            Err(failure) if failure.is(&[PARAMETER_IS_GONE]) => Ok(None),
            there => Ok(there?.parameter.and_then(|parameter| parameter.value)),
        }
    }

    /// Removes the parameters that hold these AMIs, and only those: another stack may have published since.
    pub async fn withdraw(&self, amis: &[Ami]) -> Result<(), Failure> {
        for name in amis.iter().map(Ami::parameter).chain([LATEST.to_owned()]) {
            let published = self.parameter(&name).await?;
            if amis.iter().any(|ami| Some(&ami.ami_id) == published.as_ref()) {
                self.delete_parameter(&name).await?;
            }
        }
        Ok(())
    }

    async fn delete_parameter(&self, name: &str) -> Result<(), Failure> {
        let removed = self.ssm.delete_parameter().name(name).send().await;
        match removed.map_err(|error| Failure::aws(format!("removing parameter {name}"), error)) {
            Err(failure) if !failure.is(&[PARAMETER_IS_GONE]) => Err(failure),
            _ => Ok(()),
        }
    }

    /// Deregisters AMIs, with their snapshots and parameters, except those that are in use.
    pub async fn remove(&self, amis: &[Ami]) -> Result<(), Failure> {
        if amis.is_empty() {
            return Ok(());
        }
        let used = self.in_use().await?;
        for ami in amis {
            if let Some(user) = used.iter().find(|user| user.names(ami)) {
                warn!(ami = ami.ami_id, name = ami.ami_name, used_by = user.who, "an AMI that is in use is kept");
                continue;
            }
            // First, so that nobody finds it there when it is gone.
            self.withdraw(std::slice::from_ref(ami)).await?;
            self.deregister(ami).await?;
        }
        Ok(())
    }

    async fn deregister(&self, ami: &Ami) -> Result<(), Failure> {
        let Ami { ami_id, ami_name } = ami;
        let doing = || format!("deregistering AMI {ami_id} ({ami_name}) with its snapshots");
        let removed = self.ec2.deregister_image().image_id(ami_id).delete_associated_snapshots(true).send().await;
        let removed = match removed.map_err(|error| Failure::aws(doing(), error)) {
            // One that is gone has no tag by which the function might touch it.
            Err(_) if !self.exists(ami).await? => return Ok(()),
            removed => removed?,
        };
        for snapshot in removed.delete_snapshot_results() {
            let id = snapshot.snapshot_id().unwrap_or_default();
            match snapshot.return_code().map(|code| code.as_str()) {
                Some("success") | None => info!(ami = ami_id, name = ami_name, snapshot = id, "deregistered"),
                Some(code) => return Err(Failure::new(format!("{} left snapshot {id}: {code}", doing()))),
            }
        }
        Ok(())
    }

    /// Who uses which AMI: the running clusters, and the stacks with a parameter that names one.
    async fn in_use(&self) -> Result<Vec<Use>, Failure> {
        let mut used = Vec::new();
        let mut clusters = self.emr.list_clusters().set_cluster_states(Some(ALIVE.to_vec())).into_paginator().send();
        while let Some(page) = clusters.next().await {
            let page = page.map_err(|error| Failure::aws("looking for the clusters that use an AMI", error))?;
            for id in page.clusters.unwrap_or_default().into_iter().filter_map(|cluster| cluster.id) {
                let cluster = self.emr.describe_cluster().cluster_id(&id).send().await;
                let cluster = cluster.map_err(|error| Failure::aws(format!("looking at cluster {id}"), error))?;
                let image = cluster.cluster.and_then(|cluster| cluster.custom_ami_id);
                used.extend(image.map(|what| Use { what, who: format!("cluster {id}") }));
            }
        }
        let mut stacks = self.cloudformation.describe_stacks().into_paginator().send();
        while let Some(page) = stacks.next().await {
            let page = page.map_err(|error| Failure::aws("looking for the stacks that name an AMI", error))?;
            for stack in page.stacks.unwrap_or_default() {
                let who = || format!("stack {}", stack.stack_name().unwrap_or_default());
                // Of a parameter from the Parameter Store, the name and what stood there when the stack was made.
                let values =
                    stack.parameters().iter().flat_map(|given| [given.parameter_value(), given.resolved_value()]);
                used.extend(values.flatten().map(|what| Use { what: what.to_owned(), who: who() }));
            }
        }
        Ok(used)
    }
}

/// Somebody names something: an AMI's id, or a parameter that holds it.
struct Use {
    what: String,
    who: String,
}

impl Use {
    fn names(&self, ami: &Ami) -> bool {
        self.what == ami.ami_id || self.what == ami.parameter()
    }
}
