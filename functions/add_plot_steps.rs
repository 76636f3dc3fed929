//! `Custom::LivyPlotSteps` in hail-emr: adds the steps that make a running cluster ready for plots, and answers when
//! they have completed, or with the failed step's own reason.
//!
//! Native `Steps` of `AWS::EMR::Cluster` are create-only: changing one would replace the cluster (its resource
//! schema). These run on a live cluster.
//!
//! | | |
//! |---|---|
//! | properties | `ClusterId`; `HailBucket`, where the cluster's manifest goes; `EfsFileSystemId`, empty for none |
//! | Data | `Steps` (their names), `PlotDirectory` on the primary node |
//! | Create, Update | run the steps that have not run on this cluster in this form |
//! | Delete | cancels steps that have not begun; what a step did goes with the cluster |
//! | replacement | another `ClusterId` |
//!
//! The steps are the scripts in `plot_steps/`, each passed whole to `bash -c` by EMR's `command-runner.jar`. That a
//! step has run is seen from the cluster itself: the newest step of that name has the same arguments and did not fail.

use crate::custom_resource::{Answer, Progress, Provider, Resource, detail_of, read_properties};
use crate::failure::Failure;
use aws_config::SdkConfig;
use aws_sdk_emr::Client;
use aws_sdk_emr::types::{ActionOnFailure, HadoopJarStepConfig, StepConfig, StepState, StepSummary};
use serde::{Deserialize, Serialize};
use serde_json::Value;

/// Where Livy's sessions write plots on the primary node.
const PLOT_DIRECTORY: &str = "/var/www/html/plots";

/// How EMR says that there is no such cluster, and that it takes no steps any more.
const CLUSTER_IS_GONE: [&str; 2] = ["InvalidRequestException", "ValidationException"];

/// See the module.
pub struct AddPlotSteps {
    emr: Client,
}

/// What the template says.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct Properties {
    cluster_id: String,
    hail_bucket: String,
    #[serde(default)]
    efs_file_system_id: String,
}

/// What `Fn::GetAtt` gives.
#[derive(Debug, Serialize)]
#[serde(rename_all = "PascalCase")]
pub struct Data {
    steps: String,
    plot_directory: &'static str,
}

/// Steps under way.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct Awaited {
    cluster_id: String,
    step_ids: Vec<String>,
}

/// A step as it should be: its name in EMR's console, and the arguments of `command-runner.jar`.
struct Wanted {
    name: &'static str,
    arguments: Vec<String>,
}

/// The steps of a cluster, in the order in which EMR runs them.
fn wanted(properties: &Properties) -> Vec<Wanted> {
    macro_rules! step {
        ($name:literal, $file:literal $(, $argument:expr)*) => {
            Wanted {
                name: $name,
                arguments: [
                    "bash", "-c", include_str!(concat!("plot_steps/", $file, ".sh")), $file $(, $argument)*
                ].map(str::to_owned).to_vec(),
            }
        };
    }
    let mut steps = vec![
        step!("Hail: plot directory", "plot-directory"),
        step!("Hail: plot web server", "web-server"),
        step!("Hail: Livy port range", "livy-port-range"),
        step!("Hail: VEP ownership", "vep-ownership"),
        step!("Hail: cluster manifest", "cluster-manifest", &properties.hail_bucket),
    ];
    if !properties.efs_file_system_id.is_empty() {
        steps.push(step!("Hail: EFS mount", "efs-mount", &properties.efs_file_system_id));
    }
    steps
}

impl AddPlotSteps {
    /// With the function's own credentials.
    pub fn connect(aws: &SdkConfig) -> Self {
        Self { emr: Client::new(aws) }
    }

    /// All steps of the cluster, the newest first, as EMR lists them.
    async fn steps(&self, cluster_id: &str) -> Result<Vec<StepSummary>, Failure> {
        let mut pages = self.emr.list_steps().cluster_id(cluster_id).into_paginator().send();
        let mut steps = Vec::new();
        while let Some(page) = pages.next().await {
            let page =
                page.map_err(|error| Failure::aws(format!("listing the steps of cluster {cluster_id}"), error))?;
            steps.extend(page.steps.unwrap_or_default());
        }
        Ok(steps)
    }

    /// Adds what is missing and gives the ids of all wanted steps.
    async fn ensure(&self, properties: &Properties) -> Result<Answer<Self>, Failure> {
        let cluster_id = &properties.cluster_id;
        let there = self.steps(cluster_id).await?;
        let mut step_ids = Vec::new();
        let mut missing = Vec::new();
        for step in wanted(properties) {
            match there.iter().find(|found| found.name() == Some(step.name)) {
                Some(found) if has_run_as(found, &step) => step_ids.extend(found.id.clone()),
                _ => missing.push(step_config(step)),
            }
        }
        if !missing.is_empty() {
            let added = self
                .emr
                .add_job_flow_steps()
                .job_flow_id(cluster_id)
                .set_steps(Some(missing))
                .send()
                .await
                .map_err(|error| Failure::aws(format!("adding the plot steps to cluster {cluster_id}"), error))?;
            step_ids.extend(added.step_ids.unwrap_or_default());
        }
        Ok(Answer::Later(Awaited { cluster_id: cluster_id.clone(), step_ids }))
    }

    /// The sentence for a step that did not complete.
    async fn why_not(&self, cluster_id: &str, step: &StepSummary) -> Failure {
        let name = step.name().unwrap_or("without a name");
        let status = step.status();
        let state = status.and_then(|status| status.state()).map_or("unknown", StepState::as_str);
        let details = status.and_then(|status| status.failure_details());
        let mut why: Vec<String> = [
            details.and_then(|details| details.reason()),
            details.and_then(|details| details.message()),
            status.and_then(|status| status.state_change_reason()).and_then(|reason| reason.message()),
        ]
        .into_iter()
        .flatten()
        .filter(|text| !text.is_empty())
        .map(str::to_owned)
        .collect();
        // Steps of a cluster that ends are cancelled: why the cluster ended is what the reader needs.
        if state != StepState::Failed.as_str() {
            why.extend(self.why_cluster_ended(cluster_id).await);
        }
        if why.is_empty() {
            why.push("EMR gives no reason; somebody may have cancelled it".into());
        }
        let log = details
            .and_then(|details| details.log_file())
            .map_or_else(String::new, |file| format!(" Its log: {file}."));
        Failure::new(format!(
            "step \"{name}\" ({}) of cluster {cluster_id} is {state}: {}.{log} Mend the cause and update the stack: steps \
             that completed are not run again",
            step.id().unwrap_or_default(),
            why.join(": ").trim_end_matches('.')
        ))
    }

    async fn why_cluster_ended(&self, cluster_id: &str) -> Option<String> {
        let described = self.emr.describe_cluster().cluster_id(cluster_id).send().await.ok()?;
        let status = described.cluster?.status?;
        let reason = status.state_change_reason?.message?;
        Some(format!("the cluster is {}: {reason}", status.state?))
    }
}

/// Whether EMR has this very step: done, or still to come.
fn has_run_as(found: &StepSummary, step: &Wanted) -> bool {
    let arguments = found.config().map(|config| config.args()).unwrap_or_default();
    let state = found.status().and_then(|status| status.state());
    arguments == step.arguments && matches!(state, Some(StepState::Pending | StepState::Running | StepState::Completed))
}

fn step_config(step: Wanted) -> StepConfig {
    let command = HadoopJarStepConfig::builder().jar("command-runner.jar").set_args(Some(step.arguments)).build();
    StepConfig::builder()
        .name(step.name)
        // A step that fails must not take the cluster, and a person's work, with it.
        .action_on_failure(ActionOnFailure::Continue)
        .hadoop_jar_step(command)
        .build()
}

impl Provider for AddPlotSteps {
    type Properties = Properties;
    type Data = Data;
    type Awaited = Awaited;

    fn read(&self, _: &str, properties: Value) -> Result<Properties, String> {
        read_properties(properties)
    }

    fn identity(&self, properties: &Properties) -> String {
        properties.cluster_id.clone()
    }

    async fn create(&self, _: &Resource, new: Properties) -> Result<Answer<Self>, Failure> {
        self.ensure(&new).await
    }

    async fn update(&self, _: &Resource, new: Properties, _: Option<Properties>) -> Result<Answer<Self>, Failure> {
        self.ensure(&new).await
    }

    async fn delete(&self, _: &Resource, old: Properties) -> Result<(), Failure> {
        let cluster_id = &old.cluster_id;
        let names: Vec<_> = wanted(&old).iter().map(|step| step.name).collect();
        let there = match self.steps(cluster_id).await {
            Err(failure) if failure.is(&CLUSTER_IS_GONE) => return Ok(()),
            steps => steps?,
        };
        let pending: Vec<_> = there
            .iter()
            .filter(|step| step.name().is_some_and(|name| names.contains(&name)))
            .filter(|step| step.status().and_then(|status| status.state()) == Some(&StepState::Pending))
            .filter_map(|step| step.id.clone())
            .collect();
        if pending.is_empty() {
            return Ok(());
        }
        let cancelled = self.emr.cancel_steps().cluster_id(cluster_id).set_step_ids(Some(pending)).send().await;
        match cancelled.map_err(|error| Failure::aws(format!("cancelling the steps of cluster {cluster_id}"), error)) {
            Err(failure) if !failure.is(&CLUSTER_IS_GONE) => Err(failure),
            _ => Ok(()),
        }
    }

    fn key(&self, awaited: &Awaited) -> String {
        awaited.cluster_id.clone()
    }

    async fn poll(&self, awaited: &Awaited) -> Result<Progress<Self>, Failure> {
        let cluster_id = &awaited.cluster_id;
        let there = self.steps(cluster_id).await?;
        let ours: Vec<_> = there
            .iter()
            .filter(|step| step.id().is_some_and(|id| awaited.step_ids.iter().any(|ours| ours == id)))
            .collect();
        let state = |step: &StepSummary| step.status().and_then(|status| status.state()).cloned();
        // Oldest first, so that the first thing that went wrong is the one that is told.
        for step in ours.iter().rev() {
            if matches!(state(step), Some(StepState::Failed | StepState::Cancelled | StepState::Interrupted)) {
                return Err(self.why_not(cluster_id, step).await);
            }
        }
        if ours.len() == awaited.step_ids.len() && ours.iter().all(|step| state(step) == Some(StepState::Completed)) {
            let names: Vec<_> = ours.iter().rev().filter_map(|step| step.name()).collect();
            return Ok(Progress::Ready(Data { steps: names.join(", "), plot_directory: PLOT_DIRECTORY }));
        }
        let awaited = Awaited { cluster_id: cluster_id.clone(), step_ids: awaited.step_ids.clone() };
        Ok(Progress::Waiting(awaited))
    }

    fn gave_up(&self, awaited: &Awaited) -> Result<Data, Failure> {
        Err(Failure::new(format!(
            "the plot steps of cluster {} have not ended in time; a step before them may still be running: look at the \
             cluster's steps in the EMR console, then update the stack",
            awaited.cluster_id
        )))
    }

    fn key_in(&self, event: &Value) -> Result<String, Failure> {
        #[derive(Deserialize, Serialize)]
        #[serde(rename_all = "camelCase")]
        struct Detail {
            cluster_id: String,
        }
        detail_of(event, "a cluster").map(|detail: Detail| detail.cluster_id)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_argument_of_a_step_fits_into_what_emr_takes() {
        // 10,280 characters an argument (AWS: StepConfig of RunJobFlow).
        let properties = Properties {
            cluster_id: "j-1".into(),
            hail_bucket: "b".repeat(63),
            efs_file_system_id: "fs-0123456789abcdef0".into(),
        };
        let steps = wanted(&properties);
        assert_eq!(steps.len(), 6);
        for step in steps {
            for argument in step.arguments {
                assert!(argument.chars().count() <= 10_280, "{} is too long", step.name);
            }
        }
    }
}
