//! `Custom::HailAmi` and `Custom::HailAmiWait` in hail-ami: build the AMI with CodeBuild and Packer, wait for it as
//! long as it takes, publish its id.
//!
//! | `Custom::HailAmi` | |
//! |---|---|
//! | properties | `ProjectName`, `AmiName`, `HailVersion`, `VepVersion` (`none` or a release), `EmrReleaseLabel`, `RebuildToken` (any text) |
//! | Create, Update | starts a build, unless the project has built, or is building, the same thing; an Update stops the build of what it goes away from |
//! | Delete | stops the project's running builds and removes the parameters it published; AMIs are kept |
//! | **`Custom::HailAmiWait`** | |
//! | properties | `ProjectName`, `BuildId` of the resource before, `LastWait` (`true` on the last one) |
//! | Delete | nothing |
//! | **both** | |
//! | Data | `BuildId`, `Status` (`SUCCEEDED` or `IN_PROGRESS`), and `AmiId`, `AmiName` when it has succeeded |
//!
//! An AMI with VEP takes up to three hours and an operation of a custom resource one at most, so the template chains
//! several: each answers `IN_PROGRESS` shortly before its hour is over and hands the build's id to the next. The last
//! one fails instead.
//!
//! Whoever started a build, when it succeeds its AMI is published at `/hail/ami/<name>`, and the newest of all at
//! `/hail/ami/latest` (data type `aws:ec2:image`).
//!
//! Going back to what was built before (a rollback, above all) takes the AMI, if it is there still: each build carries the
//! digest of what it was asked for in `BUILD_INPUTS`, and CodeBuild keeps its builds for a year.

use crate::custom_resource::{Answer, Progress, Provider, Resource, detail_of, hex_digest, read_properties, scalar};
use crate::failure::Failure;
use aws_config::SdkConfig;
use aws_sdk_codebuild::types::{Build, EnvironmentVariable, SortOrderType, StatusType};
use aws_sdk_ssm::types::ParameterType;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use std::collections::BTreeMap;

/// Where the newest AMI's id is published.
const LATEST: &str = "/hail/ami/latest";

/// The variable of a build that holds the digest of what it was asked for.
const BUILD_INPUTS: &str = "BUILD_INPUTS";

/// How SSM says that there is no such parameter.
const PARAMETER_IS_GONE: &str = "ParameterNotFound";

/// Lines at the end of a failed build's log that its reason quotes.
const LOG_LINES: i32 = 15;

/// Which Hail goes with which EMR release, and which VEP releases there are: the one table, which the Packer build
/// and the documentation use too.
const COMPATIBILITY: &str = include_str!("../packer/compatibility.json");

/// See the module.
pub struct BuildAmi {
    codebuild: aws_sdk_codebuild::Client,
    ec2: aws_sdk_ec2::Client,
    logs: aws_sdk_cloudwatchlogs::Client,
    ssm: aws_sdk_ssm::Client,
}

/// What the template says.
#[derive(Debug)]
pub enum Properties {
    /// `Custom::HailAmi`
    Start(Start),
    /// `Custom::HailAmiWait`
    Wait(Wait),
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
    #[serde(default)]
    rebuild_token: String,
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

/// What `Fn::GetAtt` gives.
#[derive(Debug, Serialize)]
#[serde(rename_all = "PascalCase")]
pub struct Data {
    build_id: String,
    status: String,
    #[serde(flatten)]
    ami: Option<Ami>,
}

/// What a successful build hands out.
#[derive(Debug, Serialize)]
#[serde(rename_all = "PascalCase")]
struct Ami {
    ami_id: String,
    ami_name: String,
}

impl Ami {
    /// The parameter that bears its name.
    fn parameter(&self) -> String {
        format!("/hail/ami/{}", self.ami_name)
    }
}

/// A build under way.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct Awaited {
    project_name: String,
    build_id: String,
    last_wait: bool,
}

impl Start {
    /// What the build is asked for, as its environment variables.
    fn environment(&self) -> [(&'static str, &str); 4] {
        [
            ("AMI_NAME", &self.ami_name),
            ("HAIL_VERSION", &self.hail_version),
            ("VEP_VERSION", &self.vep_version),
            ("EMR_RELEASE_LABEL", &self.emr_release_label),
        ]
    }

    /// Two requests with the same digest are content with the same AMI.
    fn digest(&self) -> String {
        let texts = self.environment().into_iter().flat_map(|(name, value)| [name, value]);
        hex_digest(texts.chain([self.rebuild_token.as_str()]))
    }

    /// Refuses versions that do not go together, before anything is built.
    fn check(&self) -> Result<(), String> {
        #[derive(Deserialize)]
        struct Table {
            emr_releases: BTreeMap<String, Row>,
            vep: Vec<String>,
        }
        #[derive(Deserialize)]
        struct Row {
            hail: Vec<String>,
        }
        let table: Table = serde_json::from_str(COMPATIBILITY).map_err(|why| format!("compatibility.json: {why}"))?;
        let Some(row) = table.emr_releases.get(&self.emr_release_label) else {
            let known: Vec<_> = table.emr_releases.keys().map(String::as_str).collect();
            return Err(format!(
                "property EmrReleaseLabel: \"{}\" is not an EMR release that Hail is known to run on; it should be {}",
                self.emr_release_label,
                known.join(" or ")
            ));
        };
        if !row.hail.contains(&self.hail_version) {
            return Err(format!(
                "property HailVersion: \"{}\" does not go with {}; it should be one of {}",
                self.hail_version,
                self.emr_release_label,
                row.hail.join(", ")
            ));
        }
        if self.vep_version != "none" && !table.vep.contains(&self.vep_version) {
            return Err(format!(
                "property VepVersion: \"{}\" should be none or one of {}",
                self.vep_version,
                table.vep.join(", ")
            ));
        }
        Ok(())
    }
}

impl BuildAmi {
    /// With the function's own credentials.
    pub fn connect(aws: &SdkConfig) -> Self {
        Self {
            codebuild: aws_sdk_codebuild::Client::new(aws),
            ec2: aws_sdk_ec2::Client::new(aws),
            logs: aws_sdk_cloudwatchlogs::Client::new(aws),
            ssm: aws_sdk_ssm::Client::new(aws),
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
        let ids = listed.ids.unwrap_or_default();
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
        let digest = start.digest();
        for build in self.builds(project).await? {
            let is_same = variable(&build, BUILD_INPUTS) == Some(&digest);
            let will_do = match build.build_status() {
                Some(StatusType::InProgress) => is_same,
                Some(StatusType::Succeeded) => is_same && self.exists(&ami_of(&build)?).await?,
                _ => false,
            };
            if let (true, Some(id)) = (will_do, build.id) {
                return Ok(id);
            }
        }
        let doing = || format!("starting a build of project {project}");
        let mut request = self.codebuild.start_build().project_name(project).idempotency_token(request_id);
        for (name, value) in start.environment().into_iter().chain([(BUILD_INPUTS, digest.as_str())]) {
            let variable = EnvironmentVariable::builder().name(name).value(value).build();
            let variable = variable.map_err(|why| Failure::new(format!("{} failed: {why}", doing())))?;
            request = request.environment_variables_override(variable);
        }
        let started = request.send().await.map_err(|error| Failure::aws(doing(), error))?;
        let build_id = started.build_value.and_then(|build| build.id);
        build_id.ok_or_else(|| Failure::new(format!("{} gave no build id", doing())))
    }

    /// Whether nobody has deregistered the AMI.
    async fn exists(&self, ami: &Ami) -> Result<bool, Failure> {
        let found = self.ec2.describe_images().image_ids(&ami.ami_id).send().await;
        match found.map_err(|error| Failure::aws(format!("looking for AMI {}", ami.ami_id), error)) {
            Err(failure) if failure.is(&["InvalidAMIID.NotFound", "InvalidAMIID.Unavailable"]) => Ok(false),
            found => Ok(!found?.images.unwrap_or_default().is_empty()),
        }
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

    /// Publishes an AMI as the latest where it is, and under its name, which says that it has been published.
    async fn publish(&self, ami: &Ami, is_latest: bool) -> Result<(), Failure> {
        if is_latest {
            self.put_parameter(LATEST, &ami.ami_id).await?;
        }
        self.put_parameter(&ami.parameter(), &ami.ami_id).await
    }

    /// Whether no newer build of the project has succeeded: events may come late and twice.
    async fn is_newest(&self, build: &Build) -> Result<bool, Failure> {
        let builds = self.builds(build.project_name().unwrap_or_default()).await?;
        let newest = builds.iter().find(|build| build.build_status() == Some(&StatusType::Succeeded));
        Ok(newest.is_none_or(|newest| newest.id() == build.id()))
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

    async fn parameter(&self, name: &str) -> Result<Option<String>, Failure> {
        let there = self.ssm.get_parameter().name(name).send().await;
        match there.map_err(|error| Failure::aws(format!("reading parameter {name}"), error)) {
            Err(failure) if failure.is(&[PARAMETER_IS_GONE]) => Ok(None),
            there => Ok(there?.parameter.and_then(|parameter| parameter.value)),
        }
    }

    /// Removes a parameter if it still holds one of these AMIs: another stack may have published since.
    async fn withdraw(&self, name: &str, ami_ids: &[String]) -> Result<(), Failure> {
        if !self.parameter(name).await?.is_some_and(|ami_id| ami_ids.contains(&ami_id)) {
            return Ok(());
        }
        let removed = self.ssm.delete_parameter().name(name).send().await;
        match removed.map_err(|error| Failure::aws(format!("removing parameter {name}"), error)) {
            Err(failure) if !failure.is(&[PARAMETER_IS_GONE]) => Err(failure),
            _ => Ok(()),
        }
    }

    /// The sentence for a build that did not succeed: the phase, what CodeBuild says of it, the end of the log.
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
        let log = self.log_tail(build).await;
        let link = build.logs().and_then(|logs| logs.deep_link()).unwrap_or("in the CodeBuild console");
        Failure::new(format!("build {id} ended as {status}{where_it_ended}. The whole log: {link}. Its end:\n{log}"))
    }

    async fn log_tail(&self, build: &Build) -> String {
        let location = build.logs().and_then(|logs| Some((logs.group_name()?, logs.stream_name()?)));
        let Some((group, stream)) = location else {
            return "(the build wrote no log)".into();
        };
        let events = self
            .logs
            .get_log_events()
            .log_group_name(group)
            .log_stream_name(stream)
            .start_from_head(false)
            .limit(LOG_LINES)
            .send()
            .await;
        match events {
            Ok(events) => {
                let lines = events.events.unwrap_or_default();
                end_of(lines.iter().filter_map(|event| event.message()))
            }
            Err(error) => format!("({})", Failure::aws(format!("reading log stream {stream} of {group}"), error)),
        }
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
            other => Err(format!("the resource type should be Custom::HailAmi or Custom::HailAmiWait and is {other}")),
        }
    }

    fn check(&self, new: &Properties) -> Result<(), String> {
        match new {
            Properties::Start(start) => start.check(),
            Properties::Wait(_) => Ok(()),
        }
    }

    async fn create(&self, resource: &Resource, new: Properties) -> Result<Answer<Self>, Failure> {
        Ok(Answer::Later(match new {
            Properties::Start(start) => {
                let build_id = self.find_or_start(&start, &resource.request_id).await?;
                Awaited { project_name: start.project_name, build_id, last_wait: false }
            }
            Properties::Wait(Wait { project_name, build_id, last_wait }) => {
                Awaited { project_name, build_id, last_wait }
            }
        }))
    }

    async fn update(
        &self,
        resource: &Resource,
        new: Properties,
        old: Option<Properties>,
    ) -> Result<Answer<Self>, Failure> {
        // What this update goes away from is not wanted any more: a rollback may come in the middle of a build. A build
        // that a person started is none of the stack's.
        if let (Properties::Start(new), Some(Properties::Start(old))) = (&new, old)
            && old.digest() != new.digest()
        {
            let abandoned = old.digest();
            let builds = self.builds(&new.project_name).await?;
            self.stop(builds.iter().filter(|build| variable(build, BUILD_INPUTS) == Some(&abandoned))).await?;
        }
        self.create(resource, new).await
    }

    async fn delete(&self, _: &Resource, old: Properties) -> Result<(), Failure> {
        let Properties::Start(Start { project_name, .. }) = old else {
            return Ok(());
        };
        let builds = match self.builds(&project_name).await {
            Err(failure) if failure.is(&["ResourceNotFoundException"]) => return Ok(()),
            builds => builds?,
        };
        self.stop(builds.iter()).await?;
        let amis: Vec<_> = builds.iter().filter_map(|build| ami_of(build).ok()).collect();
        let ami_ids: Vec<_> = amis.iter().map(|ami| ami.ami_id.clone()).collect();
        for ami in &amis {
            self.withdraw(&ami.parameter(), &ami_ids).await?;
        }
        self.withdraw(LATEST, &ami_ids).await
    }

    fn key(&self, awaited: &Awaited) -> String {
        key_of(&awaited.build_id)
    }

    async fn poll(&self, awaited: &Awaited) -> Result<Progress<Self>, Failure> {
        let build = self.build(&awaited.build_id).await?;
        match build.build_status() {
            Some(StatusType::InProgress) => Ok(Progress::Waiting(awaited.clone())),
            Some(StatusType::Succeeded) => {
                let ami = ami_of(&build)?;
                // What the stack asks for is the latest, also where it goes back to an older one.
                self.publish(&ami, true).await?;
                let status = StatusType::Succeeded.to_string();
                Ok(Progress::Ready(Data { build_id: awaited.build_id.clone(), status, ami: Some(ami) }))
            }
            _ => Err(self.why_not(&build).await),
        }
    }

    fn gave_up(&self, awaited: &Awaited) -> Result<Data, Failure> {
        let Awaited { project_name, build_id, last_wait } = awaited;
        if *last_wait {
            return Err(Failure::new(format!(
                "build {build_id} of project {project_name} is still running after all the time that the stack waits; \
                 look at it in the CodeBuild console. If it succeeds its AMI will be published all the same"
            )));
        }
        Ok(Data { build_id: build_id.clone(), status: StatusType::InProgress.to_string(), ami: None })
    }

    fn key_in(&self, event: &Value) -> Result<String, Failure> {
        Ok(key_of(&build_id_in(event)?))
    }

    /// Publishes the AMI, whoever started its build.
    async fn noticed(&self, event: Value) -> Result<(), Failure> {
        let build = self.build(&build_id_in(&event)?).await?;
        if build.build_status() == Some(&StatusType::Succeeded) {
            let ami = ami_of(&build)?;
            // An event that comes late or twice must not undo what has been published since.
            if self.parameter(&ami.parameter()).await?.is_none() {
                self.publish(&ami, self.is_newest(&build).await?).await?;
            }
        }
        Ok(())
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
fn end_of<'a>(lines: impl DoubleEndedIterator<Item = &'a str>) -> String {
    const BYTES: usize = 2000;
    const LINE: usize = 300;
    let mut kept: Vec<String> = Vec::new();
    let mut bytes = 0;
    for line in lines.rev() {
        let line: String = line.trim_end().chars().take(LINE).collect();
        bytes += line.len();
        if bytes > BYTES {
            break;
        }
        kept.insert(0, line);
    }
    kept.join("\n")
}

/// The unique part of `project:uuid`.
fn key_of(build_id: &str) -> String {
    build_id.rsplit(':').next().unwrap_or_default().to_owned()
}

fn variable<'a>(build: &'a Build, name: &str) -> Option<&'a str> {
    let variables = build.environment().map(|environment| environment.environment_variables()).unwrap_or_default();
    variables.iter().find(|variable| variable.name() == name).map(EnvironmentVariable::value)
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

    fn start(hail: &str, vep: &str, emr: &str) -> Start {
        Start {
            project_name: "hail".into(),
            ami_name: "hail".into(),
            hail_version: hail.into(),
            vep_version: vep.into(),
            emr_release_label: emr.into(),
            rebuild_token: String::new(),
        }
    }

    #[test]
    fn versions_that_do_not_go_together_are_refused_with_the_ones_that_do() {
        assert_eq!(start("0.2.139", "none", "emr-7.13.0").check(), Ok(()));
        let why = start("0.2.9", "none", "emr-7.13.0").check().unwrap_err();
        assert!(
            why.starts_with("property HailVersion: \"0.2.9\" does not go with emr-7.13.0") && why.contains("0.2.139")
        );
        let why = start("0.2.139", "none", "emr-5.1.0").check().unwrap_err();
        assert!(why.contains("property EmrReleaseLabel: \"emr-5.1.0\"") && why.contains("it should be emr-7.13.0"));
        let why = start("0.2.139", "latest", "emr-7.13.0").check().unwrap_err();
        assert!(why.contains("property VepVersion: \"latest\" should be none or one of"));
    }

    #[test]
    fn the_end_of_a_log_keeps_its_last_line_whatever_comes_before() {
        let long = "x".repeat(4000);
        let log = ["first", &long, &long, &long, &long, &long, &long, &long, "Error: the cause\n"];
        let end = end_of(log.into_iter());
        assert!(end.ends_with("\nError: the cause") && end.len() < 2100 && !end.contains("first"), "{end}");
    }

    #[test]
    fn a_rebuild_token_asks_for_another_ami() {
        let first = start("0.2.139", "none", "emr-7.13.0");
        let again = Start { rebuild_token: "2".into(), ..start("0.2.139", "none", "emr-7.13.0") };
        assert_eq!(first.digest(), start("0.2.139", "none", "emr-7.13.0").digest());
        assert_ne!(first.digest(), again.digest());
    }
}
