//! `Custom::NotebookRefresh` in hail-jupyter: a changed start script, or a new set of shared notebooks, only arrives
//! at a notebook instance's next start, so an Update that changes them restarts a running instance.
//!
//! | | |
//! |---|---|
//! | properties | `NotebookInstanceName`; `Lifecycle` and `Assets`: any texts that change when what a start brings does |
//! | Data | `Status` of the instance, `Restarted` (`true` or `false`) |
//! | Create | answers at once: CloudFormation has just started the instance |
//! | Update | restarts a running instance if `Lifecycle` or `Assets` changed; a stopped one stays stopped |
//! | Delete | nothing: the instance is the stack's own resource |
//! | replacement | another `NotebookInstanceName` |
//!
//! A restart takes some minutes. Nothing sleeps through it: "SageMaker Notebook Instance State Change" events, and a
//! tick every minute, carry it from one phase to the next.

use crate::custom_resource::{Answer, Progress, Provider, Resource, detail_of, read_properties};
use crate::failure::Failure;
use aws_config::SdkConfig;
use aws_sdk_sagemaker::Client;
use aws_sdk_sagemaker::operation::describe_notebook_instance::DescribeNotebookInstanceOutput;
use aws_sdk_sagemaker::primitives::DateTime;
use aws_sdk_sagemaker::types::NotebookInstanceStatus as Status;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use std::time::SystemTime;

/// See the module.
pub struct RefreshNotebook {
    sagemaker: Client,
}

/// What the template says.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct Properties {
    notebook_instance_name: String,
    lifecycle: String,
    assets: String,
}

/// What `Fn::GetAtt` gives.
#[derive(Debug, Serialize)]
#[serde(rename_all = "PascalCase")]
pub struct Data {
    status: String,
    restarted: String,
}

/// A restart under way.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct Awaited {
    notebook_instance_name: String,
    phase: Phase,
    /// When it was told to stop, in milliseconds since 1970; 0 before that.
    stopped_at: i64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
enum Phase {
    /// It was starting or being changed when the Update came, perhaps with what it knew before: once it runs it is
    /// stopped.
    Settling,
    /// It has been told to stop: once it has, it is started.
    Stopping,
    /// It has been told to start.
    Starting,
}

impl RefreshNotebook {
    /// With the function's own credentials.
    pub fn connect(aws: &SdkConfig) -> Self {
        Self { sagemaker: Client::new(aws) }
    }

    async fn describe(&self, name: &str) -> Result<DescribeNotebookInstanceOutput, Failure> {
        self.sagemaker
            .describe_notebook_instance()
            .notebook_instance_name(name)
            .send()
            .await
            .map_err(|error| Failure::aws(format!("looking at notebook instance {name}"), error))
    }

    async fn status(&self, name: &str) -> Result<Status, Failure> {
        self.describe(name).await.map(|instance| status_of(&instance))
    }

    /// Tells it to stop; gives the time just before.
    async fn stop(&self, name: &str) -> Result<i64, Failure> {
        let now = DateTime::from(SystemTime::now()).to_millis().unwrap_or(0);
        let stopped = self.sagemaker.stop_notebook_instance().notebook_instance_name(name).send().await;
        let failure = stopped.err().map(|error| Failure::aws(format!("stopping notebook instance {name}"), error));
        self.unless_done_by_another(name, failure, &[Status::Stopping, Status::Stopped]).await?;
        Ok(now)
    }

    async fn start(&self, name: &str) -> Result<(), Failure> {
        let started = self.sagemaker.start_notebook_instance().notebook_instance_name(name).send().await;
        let failure = started.err().map(|error| Failure::aws(format!("starting notebook instance {name}"), error));
        self.unless_done_by_another(name, failure, &[Status::Pending, Status::InService]).await
    }

    /// SageMaker refuses to stop what is stopping. That is no failure: another invocation, or the person, was faster.
    async fn unless_done_by_another(
        &self,
        name: &str,
        failure: Option<Failure>,
        done: &[Status],
    ) -> Result<(), Failure> {
        match failure {
            Some(failure) if failure.is(&["ValidationException"]) && done.contains(&self.status(name).await?) => Ok(()),
            Some(failure) => Err(failure),
            None => Ok(()),
        }
    }
}

impl Provider for RefreshNotebook {
    type Properties = Properties;
    type Data = Data;
    type Awaited = Awaited;

    fn read(&self, _: &str, properties: Value) -> Result<Properties, String> {
        read_properties(properties)
    }

    fn identity(&self, properties: &Properties) -> String {
        properties.notebook_instance_name.clone()
    }

    async fn create(&self, _: &Resource, new: Properties) -> Result<Answer<Self>, Failure> {
        let status = self.status(&new.notebook_instance_name).await?;
        Ok(Answer::Now(not_restarted(status)))
    }

    async fn update(&self, _: &Resource, new: Properties, old: Option<Properties>) -> Result<Answer<Self>, Failure> {
        let name = new.notebook_instance_name;
        // Another instance has just been started, with all that is new.
        let is_up_to_date = old.is_some_and(|old| {
            old.notebook_instance_name != name || old.lifecycle == new.lifecycle && old.assets == new.assets
        });
        let (phase, stopped_at) = match self.status(&name).await? {
            status if is_up_to_date => return Ok(Answer::Now(not_restarted(status))),
            Status::InService => (Phase::Stopping, self.stop(&name).await?),
            Status::Pending | Status::Updating => (Phase::Settling, 0),
            status => return Ok(Answer::Now(not_restarted(status))),
        };
        Ok(Answer::Later(Awaited { notebook_instance_name: name, phase, stopped_at }))
    }

    async fn delete(&self, _: &Resource, _: Properties) -> Result<(), Failure> {
        Ok(())
    }

    fn key(&self, awaited: &Awaited) -> String {
        awaited.notebook_instance_name.clone()
    }

    async fn poll(&self, awaited: &Awaited) -> Result<Progress<Self>, Failure> {
        let name = &awaited.notebook_instance_name;
        let instance = self.describe(name).await?;
        let status = status_of(&instance);
        let restarted = |status: Status| Data { status: status.to_string(), restarted: "true".into() };
        let changed_at = instance.last_modified_time().and_then(|time| time.to_millis().ok()).unwrap_or(0);
        let mut stopped_at = awaited.stopped_at;
        let phase = match (awaited.phase, status) {
            (Phase::Starting, Status::InService) => return Ok(Progress::Ready(restarted(Status::InService))),
            // The person has stopped it again: a stopped instance stays stopped.
            (Phase::Starting, status @ (Status::Stopping | Status::Stopped)) => {
                return Ok(Progress::Ready(restarted(status)));
            }
            (Phase::Settling, Status::InService) => {
                stopped_at = self.stop(name).await?;
                Phase::Stopping
            }
            (Phase::Settling, status @ (Status::Stopping | Status::Stopped)) => {
                return Ok(Progress::Ready(not_restarted(status)));
            }
            (Phase::Stopping, Status::Stopped) => {
                self.start(name).await?;
                Phase::Starting
            }
            // Started by an invocation that could not write it down, or by the person.
            (Phase::Stopping, Status::Pending) => Phase::Starting,
            (Phase::Stopping, Status::InService) if changed_at > stopped_at => {
                return Ok(Progress::Ready(restarted(Status::InService)));
            }
            (phase, Status::InService | Status::Pending | Status::Stopping | Status::Updating) => phase,
            (_, status) => {
                return Err(Failure::new(format!(
                    "restarting notebook instance {name} ended in status {status}: {}. Look at its lifecycle \
                     configuration's log in /aws/sagemaker/NotebookInstances, then start it by hand or update again",
                    instance.failure_reason().unwrap_or("SageMaker gives no reason")
                )));
            }
        };
        Ok(Progress::Waiting(Awaited { notebook_instance_name: name.clone(), phase, stopped_at }))
    }

    fn gave_up(&self, awaited: &Awaited) -> Result<Data, Failure> {
        Err(Failure::new(format!(
            "notebook instance {} was to be restarted and is not back in time (last seen: {:?}); look at its state, and \
             at its log in /aws/sagemaker/NotebookInstances",
            awaited.notebook_instance_name, awaited.phase
        )))
    }

    fn key_in(&self, event: &Value) -> Result<String, Failure> {
        #[derive(Deserialize, Serialize)]
        #[serde(rename_all = "PascalCase")]
        struct Detail {
            notebook_instance_name: String,
        }
        detail_of(event, "a notebook instance").map(|detail: Detail| detail.notebook_instance_name)
    }
}

fn status_of(instance: &DescribeNotebookInstanceOutput) -> Status {
    instance.notebook_instance_status().cloned().unwrap_or_else(|| Status::from("unknown"))
}

fn not_restarted(status: Status) -> Data {
    Data { status: status.to_string(), restarted: "false".into() }
}
