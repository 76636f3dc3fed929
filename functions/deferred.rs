//! Where a request waits whose answer comes from an event.
//!
//! A request that cannot be answered now becomes an EventBridge Scheduler schedule, in the schedule group of the
//! function's own stack, named after what it waits for. The schedule's input is the request itself, so that the
//! request, its deadline and the means to look again are one thing that exists or does not:
//!
//! - an event (a build ended, a step failed) finds the request by its name and answers within seconds;
//! - the schedule itself calls the function once a minute, so that an event that never comes (EMR's and SageMaker's
//!   delivery is best effort) delays an answer and does not lose it, and so that the deadline is noticed;
//! - of several invocations that want to answer, the one whose DeleteSchedule succeeds does. Scheduler answers
//!   ResourceNotFoundException to all the others.
//!
//! The price of the last: an invocation that dies in the fraction of a second between the deletion and the delivery
//! leaves CloudFormation to its own time-out. The other order would risk two answers that differ.
//!
//! A request of an event that cannot be met now waits in the same way, and is asked again every minute: see
//! [`WaitingRoom::remind`].
//!
//! The input holds the response URL. It lives for as long as the request waits, where only `scheduler:GetSchedule`
//! on this group can read it, and it can answer this one request only.

use crate::custom_resource::Callback;
use crate::failure::Failure;
use aws_config::SdkConfig;
use aws_sdk_scheduler::Client;
use aws_sdk_scheduler::types::{FlexibleTimeWindow, FlexibleTimeWindowMode, RetryPolicy, Target};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

/// How often a waiting request looks for itself.
const EVERY_MINUTE: &str = "rate(1 minute)";

/// How Scheduler says that there is no such schedule.
const IS_GONE: &str = "ResourceNotFoundException";

/// A request that waits.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct Deferral {
    /// What it waits for, by name. The schedule's name.
    pub key: String,
    /// Where the answer goes.
    pub callback: Callback,
    /// The physical id that the answer will carry.
    pub physical_id: String,
    /// What it waits for, as the provider wrote it.
    pub awaited: Value,
    /// When to answer in any case, in seconds since 1970.
    pub gives_up_at: u64,
}

/// The schedule group of a stack.
pub struct WaitingRoom {
    scheduler: Client,
    group: String,
    role_arn: String,
}

impl WaitingRoom {
    /// A waiting room in the schedule group `group`, whose schedules call the function as `role_arn`.
    pub fn new(scheduler: Client, group: String, role_arn: String) -> Self {
        Self { scheduler, group, role_arn }
    }

    /// The room that `SCHEDULE_GROUP` and `SCHEDULE_ROLE_ARN` name; none where they are not set.
    pub fn from_environment(aws: &SdkConfig) -> Option<Self> {
        let group = std::env::var("SCHEDULE_GROUP").ok()?;
        let role_arn = std::env::var("SCHEDULE_ROLE_ARN").ok()?;
        Some(Self::new(Client::new(aws), group, role_arn))
    }

    /// Lets a request wait. A request of the same resource that already waits under this name is replaced:
    /// CloudFormation has given it up, or it is this very one.
    pub async fn put(&self, deferral: &Deferral, function_arn: &str) -> Result<(), Failure> {
        // Again where the one that was there is taken out just when it is to be replaced.
        loop {
            let created = self
                .scheduler
                .create_schedule()
                .name(&deferral.key)
                .group_name(&self.group)
                .schedule_expression(EVERY_MINUTE)
                .flexible_time_window(at_once()?)
                .target(self.target(&json!({ "Deferred": deferral }), function_arn)?)
                .send()
                .await
                .map_err(|error| Failure::aws(self.putting(&deferral.key), error));
            match created {
                Err(failure) if failure.is(&["ConflictException"]) => {}
                other => return other.map(|_| ()),
            }
            if let Some(there) = self.find(&deferral.key).await?
                && !there.callback.is_for_same_resource(&deferral.callback)
            {
                return Err(Failure::new(format!(
                    "resource {} already waits for {}: only one resource of a stack can",
                    there.callback.logical_resource_id(),
                    deferral.key
                )));
            }
            if self.replace(deferral, function_arn).await? {
                return Ok(());
            }
        }
    }

    /// Changes what waits under a name, or says that nothing does any more.
    pub async fn replace(&self, deferral: &Deferral, function_arn: &str) -> Result<bool, Failure> {
        let replaced = self
            .scheduler
            .update_schedule()
            .name(&deferral.key)
            .group_name(&self.group)
            .schedule_expression(EVERY_MINUTE)
            .flexible_time_window(at_once()?)
            .target(self.target(&json!({ "Deferred": deferral }), function_arn)?)
            .send()
            .await
            .map_err(|error| Failure::aws(self.putting(&deferral.key), error));
        match replaced {
            Err(failure) if failure.is(&[IS_GONE]) => Ok(false),
            replaced => replaced.map(|_| true),
        }
    }

    /// Invokes the function with this payload again, every minute until [`WaitingRoom::forget`].
    pub async fn remind(&self, key: &str, payload: &Value, function_arn: &str) -> Result<(), Failure> {
        let created = self
            .scheduler
            .create_schedule()
            .name(key)
            .group_name(&self.group)
            .schedule_expression(EVERY_MINUTE)
            .flexible_time_window(at_once()?)
            .target(self.target(payload, function_arn)?)
            .send()
            .await
            .map_err(|error| Failure::aws(self.putting(key), error));
        match created {
            Err(failure) if failure.is(&["ConflictException"]) => Ok(()),
            created => created.map(|_| ()),
        }
    }

    /// Ends the reminders, if there were any. True for the one caller who did.
    pub async fn forget(&self, key: &str) -> Result<bool, Failure> {
        let gone = self.scheduler.delete_schedule().name(key).group_name(&self.group).send().await;
        match gone.map_err(|error| Failure::aws(format!("taking the request {key} out of {}", self.group), error)) {
            Ok(_) => Ok(true),
            Err(failure) if failure.is(&[IS_GONE]) => Ok(false),
            Err(failure) => Err(failure),
        }
    }

    fn putting(&self, key: &str) -> String {
        format!("letting the request wait for {key} in schedule group {}", self.group)
    }

    fn target(&self, payload: &Value, function_arn: &str) -> Result<Target, Failure> {
        Target::builder()
            .arn(function_arn)
            .role_arn(&self.role_arn)
            .input(payload.to_string())
            // The next minute is the retry.
            .retry_policy(RetryPolicy::builder().maximum_retry_attempts(0).build())
            .build()
            .map_err(|why| Failure::new(format!("a request cannot wait in schedule group {}: {why}", self.group)))
    }

    /// The request that waits under this name.
    pub async fn find(&self, key: &str) -> Result<Option<Deferral>, Failure> {
        let doing = || format!("looking for the request that waits for {key} in schedule group {}", self.group);
        let found = self.scheduler.get_schedule().name(key).group_name(&self.group).send().await;
        let schedule = match found.map_err(|error| Failure::aws(doing(), error)) {
            Ok(schedule) => schedule,
            Err(failure) if failure.is(&[IS_GONE]) => return Ok(None),
            Err(failure) => return Err(failure),
        };
        let input = schedule.target().and_then(Target::input).unwrap_or_default();
        serde_json::from_str::<Input>(input)
            .map(|input| Some(input.deferred))
            .map_err(|why| Failure::new(format!("{} failed: its schedule holds no request: {why}", doing())))
    }

    /// Takes a request out. True for the one caller who may answer it.
    ///
    /// The look and the deletion are two calls, since a deletion takes no condition. A caller that is held up for
    /// seconds between them could take out the request that the next resource of a chain has put down under the same
    /// name by then; that one would time out.
    pub async fn take(&self, deferral: &Deferral) -> Result<bool, Failure> {
        match self.find(&deferral.key).await? {
            Some(there) if there.callback.is_same_request(&deferral.callback) => {}
            _ => return Ok(false),
        }
        self.forget(&deferral.key).await
    }
}

fn at_once() -> Result<FlexibleTimeWindow, Failure> {
    let window = FlexibleTimeWindow::builder().mode(FlexibleTimeWindowMode::Off).build();
    window.map_err(|why| Failure::new(format!("a schedule cannot be written: {why}")))
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Input {
    deferred: Deferral,
}
