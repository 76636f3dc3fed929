//! `Custom::HailAmi` and `Custom::HailAmiWait` in hail-ami: build the AMI with CodeBuild and Packer, wait for it as
//! long as it takes, publish its id.
//!
//! | `Custom::HailAmi` | |
//! |---|---|
//! | properties | `ProjectName`, `AmiName`, `HailVersion` (a release, or a git ref), `VepVersion` (`none` or a release), `EmrReleaseLabel`; optional: `Architecture`, `RKernel`, `KmsKeyId`, `AllowUntestedVersions` (`true`, `false`), `RebuildToken` (any text), `AmiDeletionPolicy` (`Retain`, `Delete`) |
//! | Create, Update | starts a build, unless the project has built, or is building, the same thing; an Update stops the build of what it goes away from |
//! | physical id | another one for everything that makes another AMI of it: CloudFormation sends a Delete for what was replaced |
//! | Delete | stops the build of these properties; `AmiDeletionPolicy: Delete` deregisters its AMIs |
//! | **`Custom::HailAmiWait`** | |
//! | properties | `ProjectName`, `BuildId` of the resource before, `LastWait` (`true` on the last one) |
//! | Delete | nothing |
//! | **both of them** | |
//! | Data | `BuildId`, `Status` (`SUCCEEDED` or `IN_PROGRESS`), and `AmiId`, `AmiName` when it has succeeded |
//! | **`Custom::HailAmis`**, before them and after them | |
//! | properties | `ProjectName`, `AmiDeletionPolicy` |
//! | Create, Update | nothing |
//! | Delete | stops the project's builds, whoever started them, and removes the parameters it published; `AmiDeletionPolicy: Delete` deregisters its AMIs |
//!
//! An AMI with VEP takes up to three hours and an operation of a custom resource one at most, so the template chains
//! several: each answers `IN_PROGRESS` shortly before its hour is over and hands the build's id to the next. The last
//! one fails instead.
//!
//! Whoever started a build, when it succeeds its AMI is published at `/hail/ami/<name>`, and the newest of all at
//! `/hail/ami/latest` (data type `aws:ec2:image`). After that the project's AMIs beyond the newest `AMIS_TO_KEEP` (0: all
//! are kept) are deregistered, except those that a running cluster or a parameter of a stack names. A build that
//! failed is told to the SNS topic `FAILURE_TOPIC_ARN`. What Packer could not clean up because its build was cut off is
//! removed.
//!
//! Going back to what was built before (a rollback, above all) takes the AMI, if it is there still: the variables of a
//! build say what it was asked for, and CodeBuild keeps its builds for a year.
//!
//! # Rebuilds
//!
//! `{"Request": {"ProjectName", "Reason", "Time"}}`, from a rule of EventBridge, asks for a build with the project's own
//! variables, unless one has been started since `Time`. One runs at a time: while another does, the request is asked
//! again every minute.

mod amis;
mod compatibility;
mod leftovers;

use crate::custom_resource::{
    Answer, Progress, Provider, Requested, Resource, detail_of, hex_digest, read_properties, scalar,
};
use crate::failure::Failure;
use amis::{Ami, Amis};
use aws_config::SdkConfig;
use aws_sdk_codebuild::types::{Build, EnvironmentVariable, SortOrderType, StatusType};
use aws_smithy_types::date_time::{DateTime, Format};
use compatibility::Combination;
use leftovers::{Leftovers, OF_BUILD, OF_PROJECT};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use std::env;
use tracing::{error, info};

/// Events at the end of a failed build's log among which its reason is looked for: Packer goes on to tell how it cleans up.
const LOG_EVENTS: i32 = 100;

/// How the scripts in `packer/` begin the sentence that says why they end the build.
const SCRIPT_SAYS: &str = "hail-ami error: ";

/// How CodeBuild says that the account or the project may not run another build now.
const QUOTA_IS_USED_UP: &str = "AccountLimitExceededException";

/// See the module.
pub struct BuildAmi {
    amis: Amis,
    codebuild: aws_sdk_codebuild::Client,
    leftovers: Leftovers,
    logs: aws_sdk_cloudwatchlogs::Client,
    sns: aws_sdk_sns::Client,
}

/// What the template says.
#[derive(Debug)]
pub enum Properties {
    /// `Custom::HailAmi`
    Start(Start),
    /// `Custom::HailAmiWait`
    Wait(Wait),
    /// `Custom::HailAmis`
    All(All),
}

/// Properties of `Custom::HailAmi`.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct Start {
    project_name: String,
    ami_name: String,
    hail_version: String,
    vep_version: String,
    emr_release_label: String,
    #[serde(default = "x86_64")]
    architecture: String,
    #[serde(default, deserialize_with = "scalar")]
    r_kernel: bool,
    #[serde(default)]
    kms_key_id: String,
    #[serde(default, deserialize_with = "scalar")]
    allow_untested_versions: bool,
    #[serde(default)]
    rebuild_token: String,
    #[serde(default)]
    ami_deletion_policy: DeletionPolicy,
}

fn x86_64() -> String {
    "x86_64".into()
}

/// Whether an AMI goes with what made it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
pub enum DeletionPolicy {
    /// It stays.
    #[default]
    Retain,
    /// It is deregistered, with its snapshots, unless it is in use.
    Delete,
}

/// Properties of `Custom::HailAmiWait`.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct Wait {
    project_name: String,
    build_id: String,
    #[serde(default, deserialize_with = "scalar")]
    last_wait: bool,
}

/// Properties of `Custom::HailAmis`.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct All {
    project_name: String,
    #[serde(default)]
    ami_deletion_policy: DeletionPolicy,
}

/// What is asked for besides CloudFormation's requests.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase", untagged)]
enum Request {
    /// A rule of EventBridge asks for a build.
    #[serde(rename_all = "PascalCase")]
    Rebuild { project_name: String, reason: String, time: String },
    /// A build has ended before its time.
    #[serde(rename_all = "PascalCase")]
    CleanUp { build_id: String },
}

/// What `Fn::GetAtt` gives.
#[derive(Debug, Serialize)]
#[serde(untagged)]
pub enum Data {
    /// Of the two that wait for a build.
    Build(BuildData),
    /// Of `Custom::HailAmis`.
    Nothing {},
}

/// How far the build is.
#[derive(Debug, Serialize)]
#[serde(rename_all = "PascalCase")]
pub struct BuildData {
    build_id: String,
    status: String,
    #[serde(flatten)]
    ami: Option<Ami>,
}

/// What is waited for.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub enum Awaited {
    /// A build under way.
    #[serde(rename_all = "PascalCase")]
    Build {
        /// The project that builds.
        project_name: String,
        /// CodeBuild's id of the build.
        build_id: String,
        /// Whether no other resource waits on.
        last_wait: bool,
    },
    /// That nothing is left of the project's builds, which were stopped.
    #[serde(rename_all = "PascalCase")]
    CleanUp {
        /// The project whose builds are over.
        project_name: String,
    },
}

impl Start {
    /// What the build is asked for, as its environment variables. One that is empty is as good as none.
    fn environment(&self) -> [(&'static str, &str); 9] {
        let or_not = |yes| if yes { "true" } else { "false" };
        [
            ("AMI_NAME", &self.ami_name),
            ("HAIL_VERSION", &self.hail_version),
            ("VEP_VERSION", &self.vep_version),
            ("EMR_RELEASE_LABEL", &self.emr_release_label),
            ("ARCHITECTURE", &self.architecture),
            ("R_KERNEL", or_not(self.r_kernel)),
            ("KMS_KEY_ID", &self.kms_key_id),
            ("ALLOW_UNTESTED_VERSIONS", or_not(self.allow_untested_versions)),
            ("REBUILD_TOKEN", &self.rebuild_token),
        ]
    }

    /// Whether a build was asked for the same.
    fn is_asked_of(&self, build: &Build) -> bool {
        self.environment().into_iter().all(|(name, value)| variable(build, name) == value)
    }

    /// Refuses versions that do not go together, before anything is built.
    fn check(&self) -> Result<(), String> {
        if self.allow_untested_versions {
            return Ok(());
        }
        let Self { hail_version: hail, vep_version: vep, emr_release_label: emr, .. } = self;
        Combination { hail, vep, emr }.check()
    }
}

impl BuildAmi {
    /// With the function's own credentials.
    pub fn connect(aws: &SdkConfig) -> Self {
        Self {
            amis: Amis::connect(aws),
            codebuild: aws_sdk_codebuild::Client::new(aws),
            leftovers: Leftovers::connect(aws),
            logs: aws_sdk_cloudwatchlogs::Client::new(aws),
            sns: aws_sdk_sns::Client::new(aws),
        }
    }

    /// The project's newest builds, at most 100 (what CodeBuild lists and describes at once), the newest first.
    async fn builds(&self, project: &str) -> Result<Vec<Build>, Failure> {
        let doing = || format!("looking at the builds of project {project}");
        let listed = self
            .codebuild
            .list_builds_for_project()
            .project_name(project)
            .sort_order(SortOrderType::Descending)
            .send()
            .await
            .map_err(|error| Failure::aws(doing(), error))?;
        let mut ids = listed.ids.unwrap_or_default();
        ids.truncate(100);
        if ids.is_empty() {
            return Ok(Vec::new());
        }
        let described = self.codebuild.batch_get_builds().set_ids(Some(ids.clone())).send().await;
        let mut builds = described.map_err(|error| Failure::aws(doing(), error))?.builds.unwrap_or_default();
        // BatchGetBuilds promises no order.
        builds.sort_by_key(|build| ids.iter().position(|id| build.id() == Some(id)));
        Ok(builds)
    }

    async fn build(&self, build_id: &str) -> Result<Build, Failure> {
        let described = self.codebuild.batch_get_builds().ids(build_id).send().await;
        let described = described.map_err(|error| Failure::aws(format!("looking at build {build_id}"), error))?;
        described.builds.into_iter().flatten().next().ok_or_else(|| {
            Failure::new(format!(
                "CodeBuild does not know build {build_id} any more; change RebuildToken to build anew"
            ))
        })
    }

    /// The id of a build of what is asked for: one that has succeeded or is running, or else a new one.
    async fn find_or_start(&self, start: &Start, request_id: &str) -> Result<String, Failure> {
        let project = &start.project_name;
        for build in self.builds(project).await? {
            let is_same = start.is_asked_of(&build);
            let will_do = match build.build_status() {
                Some(StatusType::InProgress) => is_same,
                Some(StatusType::Succeeded) => is_same && self.amis.exists(&ami_of(&build)?).await?,
                _ => false,
            };
            if let (true, Some(id)) = (will_do, build.id) {
                return Ok(id);
            }
        }
        self.start(project, &start.environment(), request_id).await
    }

    /// Starts a build with these variables instead of the project's own; the same one for the same token, for the five
    /// minutes that CodeBuild remembers it (AWS: StartBuild).
    async fn start(&self, project: &str, variables: &[(&str, &str)], token: &str) -> Result<String, Failure> {
        let doing = || format!("starting a build of project {project}");
        let mut request = self.codebuild.start_build().project_name(project).idempotency_token(token);
        for (name, value) in variables.iter().filter(|(_, value)| !value.is_empty()) {
            let variable = EnvironmentVariable::builder().name(*name).value(*value).build();
            let variable = variable.map_err(|why| Failure::new(format!("{} failed: {why}", doing())))?;
            request = request.environment_variables_override(variable);
        }
        let started = request.send().await.map_err(|error| Failure::aws(doing(), error));
        let started = match started {
            Err(mut failure) if failure.is(&[QUOTA_IS_USED_UP]) => {
                failure.reason +=
                    "; wait until other builds have ended, or ask Service Quotas for more concurrent builds";
                return Err(failure);
            }
            started => started?,
        };
        let build_id = started.build_value.and_then(|build| build.id);
        build_id.ok_or_else(|| Failure::new(format!("{} gave no build id", doing())))
    }

    /// Builds what the project's own variables say, if nobody has done so since it was asked for.
    async fn rebuild(&self, project: &str, since: &DateTime) -> Result<Requested, Failure> {
        let builds = self.builds(project).await?;
        let described = self.codebuild.batch_get_projects().names(project).send().await;
        let described = described.map_err(|error| Failure::aws(format!("looking at project {project}"), error))?;
        let found = described.projects.into_iter().flatten().next();
        let own =
            found.and_then(|project| project.environment).and_then(|environment| environment.environment_variables);
        let own = own.ok_or_else(|| Failure::new(format!("CodeBuild does not know project {project}")))?;
        let is_own = |build: &&Build| own.iter().all(|asked| variable(build, asked.name()) == asked.value());
        if builds.iter().filter(is_own).any(|build| build.start_time().is_some_and(|started| started >= since)) {
            return Ok(Requested::Done);
        }
        if builds.iter().any(|build| build.build_status() == Some(&StatusType::InProgress)) {
            return Ok(Requested::Later);
        }
        // Two requests at once, or one that is delivered twice, get the same build.
        let token = format!("rebuild after {}", builds.first().and_then(Build::id).unwrap_or("none"));
        match self.start(project, &[], &token).await {
            Ok(build_id) => info!(build_id, "a rebuild was started"),
            Err(failure) if failure.is(&[QUOTA_IS_USED_UP]) => return Ok(Requested::Later),
            Err(failure) => return Err(failure),
        }
        Ok(Requested::Done)
    }

    /// Tells those who have subscribed to the topic.
    async fn tell(&self, subject: &str, message: &str) -> Result<(), Failure> {
        error!(subject, message);
        let topic = env::var("FAILURE_TOPIC_ARN").unwrap_or_default();
        let told = self.sns.publish().topic_arn(&topic).subject(subject).message(message).send().await;
        told.map(|_| ()).map_err(|error| Failure::aws(format!("telling topic {topic} of a failure"), error))
    }

    /// Stops those of the builds that run.
    async fn stop(&self, builds: impl Iterator<Item = &Build>) -> Result<(), Failure> {
        for build in builds.filter(|build| build.build_status() == Some(&StatusType::InProgress)) {
            let id = build.id().unwrap_or_default();
            let stopped = self.codebuild.stop_build().id(id).send().await;
            stopped.map_err(|error| Failure::aws(format!("stopping build {id}"), error))?;
        }
        Ok(())
    }

    /// Whether no newer build of the project has succeeded: events may come late and twice.
    async fn is_newest(&self, build: &Build) -> Result<bool, Failure> {
        let builds = self.builds(build.project_name().unwrap_or_default()).await?;
        let newest = builds.iter().find(|build| build.build_status() == Some(&StatusType::Succeeded));
        Ok(newest.is_none_or(|newest| newest.id() == build.id()))
    }

    /// Deregisters the AMIs beyond the newest that are to be kept.
    async fn remove_old(&self, project: &str) -> Result<(), Failure> {
        let keep = env::var("AMIS_TO_KEEP").ok().and_then(|number| number.parse().ok()).unwrap_or(0);
        if keep == 0 {
            return Ok(());
        }
        let mut old: Vec<_> = self.amis.of_project(project).await?.into_iter().skip(keep).collect();
        let latest = self.amis.parameter(amis::LATEST).await?;
        old.retain(|ami| Some(&ami.ami_id) != latest.as_ref());
        self.amis.remove(&old).await
    }

    /// Why a build did not succeed: what its script said, the phase, what CodeBuild says of it, the end of the log.
    async fn why_not(&self, build: &Build) -> Failure {
        let id = build.id().unwrap_or_default();
        let status = build.build_status().map_or("unknown", StatusType::as_str);
        let phase = build
            .phases()
            .iter()
            .find(|phase| phase.phase_status().is_some_and(|status| *status != StatusType::Succeeded));
        let where_it_ended = phase.map_or_else(String::new, |phase| {
            let name = phase.phase_type().map_or("unknown", |phase| phase.as_str());
            let contexts: Vec<_> = phase.contexts().iter().filter_map(|context| context.message()).collect();
            format!(" in phase {name}: {}", contexts.join("; "))
        });
        let lines = self.log_tail(build).await.unwrap_or_else(|failure| vec![format!("({failure})")]);
        let said = said_by_script(&lines).map_or_else(String::new, |sentence| format!("{sentence} "));
        let link = build.logs().and_then(|logs| logs.deep_link()).unwrap_or("in the CodeBuild console");
        Failure::new(format!(
            "{said}build {id} ended as {status}{where_it_ended}. The whole log: {link}. Its end:\n{}",
            end_of(&lines)
        ))
    }

    async fn log_tail(&self, build: &Build) -> Result<Vec<String>, Failure> {
        let location = build.logs().and_then(|logs| Some((logs.group_name()?, logs.stream_name()?)));
        let Some((group, stream)) = location else {
            return Ok(vec!["(the build wrote no log)".into()]);
        };
        let events = self
            .logs
            .get_log_events()
            .log_group_name(group)
            .log_stream_name(stream)
            .start_from_head(false)
            .limit(LOG_EVENTS)
            .send()
            .await;
        let events = events.map_err(|error| Failure::aws(format!("reading log stream {stream} of {group}"), error))?;
        Ok(events.events.unwrap_or_default().into_iter().filter_map(|event| event.message).collect())
    }
}

impl Provider for BuildAmi {
    type Properties = Properties;
    type Data = Data;
    type Awaited = Awaited;

    fn read(&self, resource_type: &str, properties: Value) -> Result<Properties, String> {
        match resource_type {
            "Custom::HailAmi" => read_properties(properties).map(Properties::Start),
            "Custom::HailAmiWait" => read_properties(properties).map(Properties::Wait),
            "Custom::HailAmis" => read_properties(properties).map(Properties::All),
            other => Err(format!(
                "the resource type should be Custom::HailAmi, Custom::HailAmiWait or Custom::HailAmis and is {other}"
            )),
        }
    }

    fn check(&self, new: &Properties) -> Result<(), String> {
        match new {
            Properties::Start(start) => start.check(),
            Properties::Wait(_) | Properties::All(_) => Ok(()),
        }
    }

    fn identity(&self, properties: &Properties) -> String {
        match properties {
            Properties::Start(start) => {
                hex_digest(start.environment().into_iter().flat_map(|(name, value)| [name, value]))
            }
            Properties::Wait(_) | Properties::All(_) => String::new(),
        }
    }

    async fn create(&self, resource: &Resource, new: Properties) -> Result<Answer<Self>, Failure> {
        Ok(Answer::Later(match new {
            Properties::Start(start) => {
                let build_id = self.find_or_start(&start, &resource.request_id).await?;
                Awaited::Build { project_name: start.project_name, build_id, last_wait: false }
            }
            Properties::Wait(Wait { project_name, build_id, last_wait }) => {
                Awaited::Build { project_name, build_id, last_wait }
            }
            Properties::All(_) => return Ok(Answer::Now(Data::Nothing {})),
        }))
    }

    async fn update(
        &self,
        resource: &Resource,
        new: Properties,
        old: Option<Properties>,
    ) -> Result<Answer<Self>, Failure> {
        // What this update goes away from is not wanted any more: a rollback may come in the middle of a build.
        if let (Properties::Start(new), Some(Properties::Start(old))) = (&new, old)
            && old.environment() != new.environment()
        {
            let builds = self.builds(&new.project_name).await?;
            self.stop(builds.iter().filter(|build| old.is_asked_of(build))).await?;
        }
        self.create(resource, new).await
    }

    async fn delete(&self, _: &Resource, old: Properties) -> Result<(), Failure> {
        let (project, policy, only) = match &old {
            Properties::Wait(_) => return Ok(()),
            Properties::Start(start) => (&start.project_name, start.ami_deletion_policy, Some(start)),
            Properties::All(all) => (&all.project_name, all.ami_deletion_policy, None),
        };
        let mut builds = match self.builds(project).await {
            Err(failure) if failure.is(&["ResourceNotFoundException"]) => Vec::new(),
            builds => builds?,
        };
        builds.retain(|build| only.is_none_or(|start| start.is_asked_of(build)));
        self.stop(builds.iter()).await?;
        let mut amis: Vec<_> = builds.iter().filter_map(|build| ami_of(build).ok()).collect();
        if only.is_none() {
            // Also those of builds that CodeBuild no longer lists.
            amis.extend(self.amis.of_project(project).await?);
            amis.sort_by(|one, other| one.ami_id.cmp(&other.ami_id));
            amis.dedup();
            self.amis.withdraw(&amis).await?;
        }
        match policy {
            DeletionPolicy::Retain => Ok(()),
            DeletionPolicy::Delete => self.amis.remove(&amis).await,
        }
    }

    fn rest_of_delete(&self, _: &Resource, old: &Properties) -> Option<Awaited> {
        match old {
            Properties::All(all) => Some(Awaited::CleanUp { project_name: all.project_name.clone() }),
            // The event of the build's end has it cleaned up: the function is still there.
            Properties::Start(_) | Properties::Wait(_) => None,
        }
    }

    fn key(&self, awaited: &Awaited) -> String {
        match awaited {
            Awaited::Build { build_id, .. } => key_of(build_id),
            Awaited::CleanUp { project_name } => format!("clean-up-{}", &hex_digest([project_name.as_str()])[..32]),
        }
    }

    async fn poll(&self, awaited: &Awaited) -> Result<Progress<Self>, Failure> {
        let build_id = match awaited {
            Awaited::Build { build_id, .. } => build_id,
            Awaited::CleanUp { project_name } => {
                let nothing_left = self.leftovers.remove(OF_PROJECT, project_name).await?;
                return Ok(if nothing_left {
                    Progress::Ready(Data::Nothing {})
                } else {
                    Progress::Waiting(awaited.clone())
                });
            }
        };
        let build = self.build(build_id).await?;
        match build.build_status() {
            Some(StatusType::InProgress) => Ok(Progress::Waiting(awaited.clone())),
            Some(StatusType::Succeeded) => {
                let ami = ami_of(&build)?;
                // What the stack asks for is the latest, also where it goes back to an older one.
                self.amis.publish(&ami, true).await?;
                let status = StatusType::Succeeded.to_string();
                let build_id = build_id.clone();
                Ok(Progress::Ready(Data::Build(BuildData { build_id, status, ami: Some(ami) })))
            }
            _ => Err(self.why_not(&build).await),
        }
    }

    fn gave_up(&self, awaited: &Awaited) -> Result<Data, Failure> {
        let (project_name, build_id, last_wait) = match awaited {
            Awaited::Build { project_name, build_id, last_wait } => (project_name, build_id, last_wait),
            Awaited::CleanUp { project_name } => {
                return Err(Failure::new(format!(
                    "what the stopped builds of project {project_name} left is still there: EC2 has not ended their \
                     instance within an hour. Delete the stack again"
                )));
            }
        };
        if *last_wait {
            return Err(Failure::new(format!(
                "build {build_id} of project {project_name} is still running after all the time that the stack waits; \
                 look at it in the CodeBuild console. If it succeeds its AMI will be published all the same"
            )));
        }
        let status = StatusType::InProgress.to_string();
        Ok(Data::Build(BuildData { build_id: build_id.clone(), status, ami: None }))
    }

    fn key_in(&self, event: &Value) -> Result<String, Failure> {
        Ok(key_of(&build_id_in(event)?))
    }

    /// Publishes the AMI, whoever started its build, and removes old ones; tells of a failure.
    async fn noticed(&self, event: Value) -> Result<Option<Value>, Failure> {
        let build_id = build_id_in(&event)?;
        let build = self.build(&build_id).await?;
        match build.build_status() {
            Some(StatusType::Succeeded) => {
                let ami = ami_of(&build)?;
                // An event that comes late or twice must not undo what has been published since.
                if self.amis.parameter(&ami.parameter()).await?.is_none() {
                    self.amis.publish(&ami, self.is_newest(&build).await?).await?;
                }
                self.remove_old(build.project_name().unwrap_or_default()).await?;
                return Ok(None);
            }
            Some(StatusType::InProgress) | None => return Ok(None),
            // Whoever stopped it knows.
            Some(StatusType::Stopped) => {}
            Some(_) => {
                let why = self.why_not(&build).await;
                self.tell("A build of the Hail AMI has failed", &why.reason).await?;
            }
        }
        let request = serde_json::to_value(Request::CleanUp { build_id });
        request.map(Some).map_err(|why| Failure::new(format!("the function has a defect: {why}")))
    }

    async fn requested(&self, request: &Value) -> Result<Requested, Failure> {
        let asked = |why: String| Failure::new(format!("the request cannot be read: {why}"));
        let (project_name, reason, time) = match read_properties(request.clone()).map_err(asked)? {
            Request::Rebuild { project_name, reason, time } => (project_name, reason, time),
            Request::CleanUp { build_id } => {
                let nothing_left = self.leftovers.remove(OF_BUILD, &build_id).await?;
                return Ok(if nothing_left { Requested::Done } else { Requested::Later });
            }
        };
        let since = DateTime::from_str(&time, Format::DateTime).map_err(|why| asked(format!("Time {time}: {why}")))?;
        match self.rebuild(&project_name, &since).await {
            Err(failure) if !failure.transient => {
                let message = format!("{failure}. A rebuild was asked for: {reason} ({time})");
                self.tell("A rebuild of the Hail AMI could not be started", &message).await?;
                Ok(Requested::Done)
            }
            rebuilt => rebuilt,
        }
    }
}

/// The build that an event is about. It names the ARN: arn:aws:codebuild:region:account:build/project:uuid
fn build_id_in(event: &Value) -> Result<String, Failure> {
    #[derive(Deserialize, Serialize)]
    #[serde(rename_all = "kebab-case")]
    struct Detail {
        build_id: String,
    }
    let Detail { build_id: arn } = detail_of(event, "a build")?;
    Ok(arn.rsplit('/').next().unwrap_or_default().to_owned())
}

/// The last lines, as many as leave room for the rest of a reason. What went wrong stands at the very end.
fn end_of(lines: &[String]) -> String {
    const LINES: usize = 15;
    const BYTES: usize = 2000;
    const LINE: usize = 300;
    let mut kept: Vec<String> = Vec::new();
    let mut bytes = 0;
    for line in lines.iter().rev().take(LINES) {
        let line: String = line.trim_end().chars().take(LINE).collect();
        bytes += line.len();
        if bytes > BYTES {
            break;
        }
        kept.insert(0, line);
    }
    kept.join("\n")
}

/// The sentence by which a script in `packer/` ended the build, as one that others can follow.
fn said_by_script(lines: &[String]) -> Option<String> {
    let said = lines.iter().find_map(|line| line.split_once(SCRIPT_SAYS))?.1.trim();
    Some(if said.ends_with(['.', '!', '?']) { said.to_owned() } else { format!("{said}.") })
}

/// The unique part of `project:uuid`.
fn key_of(build_id: &str) -> String {
    build_id.rsplit(':').next().unwrap_or_default().to_owned()
}

/// The value of a variable of a build; empty where it has none of this name.
fn variable<'a>(build: &'a Build, name: &str) -> &'a str {
    let variables = build.environment().map(|environment| environment.environment_variables()).unwrap_or_default();
    variables.iter().find(|variable| variable.name() == name).map_or("", EnvironmentVariable::value)
}

/// The AMI that a successful build exports.
fn ami_of(build: &Build) -> Result<Ami, Failure> {
    let exported = |name: &str| {
        let variables = build.exported_environment_variables();
        let found = variables.iter().find(|variable| variable.name() == Some(name));
        found.and_then(|variable| variable.value()).filter(|value| !value.is_empty()).map(str::to_owned).ok_or_else(
            || {
                Failure::new(format!(
                    "build {} exports no {name}; its buildspec should name it under env: exported-variables",
                    build.id().unwrap_or_default()
                ))
            },
        )
    };
    Ok(Ami { ami_id: exported("AMI_ID")?, ami_name: exported("AMI_NAME")? })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_end_of_a_log_keeps_its_last_line_whatever_comes_before() {
        let long = "x".repeat(4000);
        let log = ["first", &long, &long, &long, &long, &long, &long, &long, "Error: the cause\n"].map(str::to_owned);
        let end = end_of(&log);
        assert!(end.ends_with("\nError: the cause") && end.len() < 2100 && !end.contains("first"), "{end}");
    }

    #[test]
    fn what_a_script_says_is_found_within_what_packer_writes_around_it() {
        let log = ["==> amazon-ebs.hail: x.sh: hail-ami error: no cache\n", "==> amazon-ebs.hail: Terminating\n"];
        assert_eq!(said_by_script(&log.map(str::to_owned)).as_deref(), Some("no cache."));
        assert_eq!(said_by_script(&["Timeout waiting for SSH".to_owned()]), None);
    }

    #[test]
    fn everything_that_makes_another_ami_makes_another_resource_of_it() {
        let given = |name: &str, value: &str| {
            let mut properties = serde_json::json!({
                "ProjectName": "p", "AmiName": "hail", "HailVersion": "0.2.139", "VepVersion": "none",
                "EmrReleaseLabel": "emr-7.13.0",
            });
            properties[name] = value.into();
            let start: Start = read_properties(properties).unwrap();
            start.environment().map(|(name, value)| (name, value.to_owned()))
        };
        let before = given("AmiName", "hail");
        for name in
            ["HailVersion", "VepVersion", "EmrReleaseLabel", "Architecture", "KmsKeyId", "RebuildToken", "AmiName"]
        {
            assert_ne!(given(name, "other"), before, "{name}");
        }
        for name in ["RKernel", "AllowUntestedVersions"] {
            assert_ne!(given(name, "true"), before, "{name}");
        }
        for (name, value) in [("AmiDeletionPolicy", "Delete"), ("ProjectName", "q"), ("RKernel", "false")] {
            assert_eq!(given(name, value), before, "{name}");
        }
    }
}
