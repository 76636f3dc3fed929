//! The protocol with CloudFormation, once, so that no function can get it wrong.
//!
//! A function implements [`Provider`]: create, update and delete over its own typed properties and Data. [`run`] does
//! the rest. The rules it keeps:
//!
//! - **Exactly one answer per request**, whatever happens: an error, a panic, properties that do not parse, a
//!   dependency that hangs. The work is stopped early enough to deliver the answer before the function's deadline.
//! - **An answer that is heard.** A response URL that does not answer, or answers 5xx or 429, is tried again with
//!   jittered backoff while time lasts. If it never takes the answer the invocation fails, so that Lambda repeats it.
//! - **An answer that is accepted**: a PUT with an empty content type, 4,096 bytes at most (AWS: custom resource
//!   response objects). The reason is cut to fit, Data never is: Data that is too large becomes a FAILED that says so.
//! - **A physical id that means something**: derived from stack, logical id and [`Provider::identity`], so that a
//!   repeated invocation gives the same one. A Create refused before anything was made carries [`NOTHING_MADE`]; the
//!   Delete that CloudFormation sends for it succeeds without calling the provider.
//! - **The response URL is a secret**: it is never logged.
//!
//! A provider answers *now* or *later*. A later answer is looked for by [`Provider::poll`], whenever an event says
//! that something may have changed and once a minute besides; [`crate::deferred`] says how.

use crate::deferred::{Deferral, WaitingRoom};
use crate::failure::Failure;
use aws_config::{BehaviorVersion, SdkConfig};
use aws_lambda_events::event::eventbridge::EventBridgeEvent;
use aws_smithy_http_client::tls::{self, rustls_provider::CryptoMode};
use aws_smithy_runtime_api::client::http::{HttpConnector, HttpConnectorSettings, SharedHttpConnector, http_client_fn};
use aws_smithy_runtime_api::http::Request as HttpRequest;
use aws_smithy_types::body::SdkBody;
use futures_util::FutureExt;
use lambda_runtime::{Diagnostic, LambdaEvent, service_fn};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Deserializer, Serialize};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use std::any::Any;
use std::cell::RefCell;
use std::fmt::{self, Display};
use std::future::Future;
use std::panic::AssertUnwindSafe;
use std::str::FromStr;
use std::time::{Duration, SystemTime, UNIX_EPOCH};
use tokio::time::Instant;
use tracing::{error, info, warn};

/// The physical id of a resource whose Create was refused before anything was made.
pub const NOTHING_MADE: &str = "hail-emr:nothing-was-made";

/// Bytes that CloudFormation takes as an answer (AWS: custom resource response objects).
const ANSWER_LIMIT: usize = 4096;

/// Seconds that CloudFormation waits where a resource does not say (AWS: `ServiceTimeout`, 1 to 3600).
const DEFAULT_SERVICE_TIMEOUT: u64 = 3600;

/// What it may take to let a request wait again whose answer was not delivered.
const PUTTING_BACK: Duration = Duration::from_secs(5);

/// One kind of custom resource.
#[allow(async_fn_in_trait)] // Only `run` calls these, on one thread: no caller needs the futures to be `Send`.
pub trait Provider {
    /// What the template says.
    type Properties;
    /// What `Fn::GetAtt` gives.
    type Data: Serialize;
    /// What a later answer waits for. It must say all that [`Provider::poll`] needs.
    type Awaited: Serialize + DeserializeOwned;

    /// Reads the properties. The error is a sentence that names the property and what it should have been.
    /// Most do so by [`read_properties`].
    fn read(&self, resource_type: &str, properties: Value) -> Result<Self::Properties, String>;

    /// Refuses what can be refused before anything is created, in the same words. Not asked on a Delete: what is
    /// there must go, also where it would be refused today.
    fn check(&self, _new: &Self::Properties) -> Result<(), String> {
        Ok(())
    }

    /// Properties that make another thing of it: when they change, CloudFormation sees a new physical id and sends a
    /// Delete for the old one.
    fn identity(&self, _properties: &Self::Properties) -> String {
        String::new()
    }

    /// Makes it. May be called again with the same request.
    async fn create(&self, resource: &Resource, new: Self::Properties) -> Result<Answer<Self>, Failure>;

    /// Changes it. `old` is missing where the old properties cannot be read, as after an Update that was refused.
    async fn update(
        &self,
        resource: &Resource,
        new: Self::Properties,
        old: Option<Self::Properties>,
    ) -> Result<Answer<Self>, Failure>;

    /// Takes away what it made and nothing else. Succeeds when that is already gone.
    async fn delete(&self, resource: &Resource, old: Self::Properties) -> Result<(), Failure>;

    /// What of a Delete `delete` has only begun: `poll` carries it on, and the answer waits for that.
    fn rest_of_delete(&self, _resource: &Resource, _old: &Self::Properties) -> Option<Self::Awaited> {
        None
    }

    /// A name for what is waited for, by which an event finds the request: letters, digits, `-`, `_` and `.`, at
    /// most 64. One request waits under a name; a newer one takes its place.
    fn key(&self, _awaited: &Self::Awaited) -> String {
        unreachable!("only providers that answer later have keys")
    }

    /// Looks whether what was waited for has happened. Called many times, by several invocations at once.
    async fn poll(&self, _awaited: &Self::Awaited) -> Result<Progress<Self>, Failure> {
        Err(Failure::new("this resource never answers later"))
    }

    /// The answer when CloudFormation's patience is about to end and `poll` still says `Waiting`.
    fn gave_up(&self, _awaited: &Self::Awaited) -> Result<Self::Data, Failure> {
        Err(Failure::new("it took longer than CloudFormation waits"))
    }

    /// The key of the request that may be answered now that this EventBridge event has come.
    fn key_in(&self, _event: &Value) -> Result<String, Failure> {
        Err(Failure::new("this function takes no events"))
    }

    /// Does what a rule of EventBridge asks for in `{"Request": ...}`; the same request may come many times.
    async fn requested(&self, _request: &Value) -> Result<Requested, Failure> {
        Err(Failure::new("this function takes no requests of rules"))
    }

    /// Does what else an event is good for, after the request has been looked at. What it gives is a request as
    /// [`Provider::requested`] takes it, to be met from now on.
    async fn noticed(&self, _event: Value) -> Result<Option<Value>, Failure> {
        Ok(None)
    }
}

/// What came of a rule's request.
pub enum Requested {
    /// It has been met.
    Done,
    /// It cannot be met now: it is asked again every minute.
    Later,
}

/// What a Create or an Update answers.
pub enum Answer<P: Provider + ?Sized> {
    /// It is done.
    Now(P::Data),
    /// It has been started; `poll` will know.
    Later(P::Awaited),
}

/// What `poll` found.
pub enum Progress<P: Provider + ?Sized> {
    /// Not yet. What is awaited from now on may differ from before (the next of several phases).
    Waiting(P::Awaited),
    /// It is done.
    Ready(P::Data),
}

/// The resource that a request is about.
#[derive(Debug, Clone)]
pub struct Resource {
    /// Derived from the stack, the logical id and the provider's identity.
    pub physical_id: String,
    /// The same for a repeated invocation: an idempotency token.
    pub request_id: String,
}

/// Where and for what an answer is owed.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct Callback {
    #[serde(rename = "ResponseURL")]
    response_url: Secret,
    stack_id: String,
    request_id: String,
    logical_resource_id: String,
}

impl Callback {
    /// Whether both are about the same resource of the same stack.
    pub fn is_for_same_resource(&self, other: &Callback) -> bool {
        self.stack_id == other.stack_id && self.logical_resource_id == other.logical_resource_id
    }

    /// The logical id of the resource, for messages.
    pub fn logical_resource_id(&self) -> &str {
        &self.logical_resource_id
    }

    /// Whether both are the same request.
    pub fn is_same_request(&self, other: &Callback) -> bool {
        self.request_id == other.request_id
    }
}

/// A pre-signed URL: whoever has it can answer.
#[derive(Clone, Serialize, Deserialize)]
#[serde(transparent)]
struct Secret(String);

impl fmt::Debug for Secret {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("(secret)")
    }
}

/// What became of a request.
enum Done {
    /// It can be answered with this Data.
    Now(Value),
    /// It waits under this key.
    Waits(String),
}

/// What is told to CloudFormation: the physical id, and Data or the reason why not.
struct Outcome {
    physical_id: String,
    result: Result<Value, String>,
}

/// An invocation that could not do its work or deliver its answer. Lambda repeats it (twice, AWS: asynchronous
/// invocation) and it counts as an error in the function's metrics.
#[derive(Debug)]
pub struct Undone(pub String);

impl From<Undone> for Diagnostic {
    fn from(undone: Undone) -> Self {
        Diagnostic { error_type: "Undone".into(), error_message: undone.0 }
    }
}

impl From<Failure> for Undone {
    fn from(failure: Failure) -> Self {
        Undone(failure.reason)
    }
}

/// Time and place of one invocation.
#[derive(Clone)]
struct Invocation {
    deadline: Instant,
    function_arn: String,
    log: String,
}

impl Invocation {
    fn of(context: &lambda_runtime::Context) -> Self {
        let left = Duration::from_millis(context.deadline).saturating_sub(since_epoch());
        Self {
            deadline: Instant::now() + left,
            function_arn: context.invoked_function_arn.clone(),
            log: format!("log group {}, stream {}", context.env_config.log_group, context.env_config.log_stream),
        }
    }

    fn left(&self) -> Duration {
        self.deadline.saturating_duration_since(Instant::now())
    }

    /// How long the work may take, so that there is time to spare for delivering the answer.
    fn time_for_work(&self) -> Duration {
        let left = self.left();
        left - (left / 4).min(Duration::from_secs(15))
    }
}

/// A provider with what it needs to be heard.
pub struct Function<P> {
    provider: P,
    http: SharedHttpConnector,
    waiting_room: Option<WaitingRoom>,
}

/// Runs a Lambda function until Lambda ends it. Called by the binaries and nowhere else.
pub async fn run<P: Provider>(connect: impl FnOnce(&SdkConfig) -> P) -> Result<(), lambda_runtime::Error> {
    init_log();
    let http = http_connector();
    let shared = http.clone();
    let aws = aws_config::defaults(BehaviorVersion::latest())
        .http_client(http_client_fn(move |_, _| shared.clone()))
        .load()
        .await;
    let function = Function::new(connect(&aws), http, WaitingRoom::from_environment(&aws));
    lambda_runtime::run(service_fn(|event| function.handle(event))).await
}

/// Logs go to standard output, as lines or as JSON, as the function's logging configuration says. Only this
/// package's level can be raised: the libraries' debug logs hold requests, and so the response URL.
fn init_log() {
    use tracing_subscriber::{filter::LevelFilter, filter::Targets, fmt, prelude::*};
    let level = std::env::var("AWS_LAMBDA_LOG_LEVEL")
        .ok()
        .and_then(|level| LevelFilter::from_str(&level).ok())
        .unwrap_or(LevelFilter::INFO);
    let ours = Targets::new().with_default(LevelFilter::WARN).with_target("hail_emr", level);
    let lines = fmt::layer().without_time().with_target(false).with_ansi(false);
    let json = std::env::var("AWS_LAMBDA_LOG_FORMAT").is_ok_and(|format| format.eq_ignore_ascii_case("json"));
    let lines = if json { lines.json().boxed() } else { lines.boxed() };
    tracing_subscriber::registry().with(lines.with_filter(ours)).init();
}

/// The one HTTP client of a function: for the AWS calls and for the answers.
pub fn http_connector() -> SharedHttpConnector {
    let settings = HttpConnectorSettings::builder().connect_timeout(Duration::from_secs(3)).build();
    SharedHttpConnector::new(
        aws_smithy_http_client::Connector::builder()
            .connector_settings(settings)
            .tls_provider(tls::Provider::Rustls(CryptoMode::Ring))
            .build(),
    )
}

impl<P: Provider> Function<P> {
    /// A function whose answers go out through `http` and which may answer later if it has a waiting room.
    pub fn new(provider: P, http: SharedHttpConnector, waiting_room: Option<WaitingRoom>) -> Self {
        Self { provider, http, waiting_room }
    }

    /// Handles one invocation: a request of CloudFormation, an event, or the minute tick of a waiting request.
    pub async fn handle(&self, event: LambdaEvent<Value>) -> Result<(), Undone> {
        let invocation = Invocation::of(&event.context);
        let payload = event.payload;
        if payload.get("ResponseURL").is_some() {
            Box::pin(self.answer_request(payload, &invocation)).await
        } else if let Some(key) = payload.pointer("/Deferred/Key").and_then(Value::as_str) {
            Box::pin(self.advance(key, &invocation)).await
        } else if payload.get("Request").is_some() {
            Box::pin(self.meet(payload, &invocation)).await
        } else if payload.get("detail-type").is_some() {
            let key = self.provider.key_in(&payload)?;
            // Whoever waits hears of a failure first, and of one in what comes after all the same.
            let advanced = Box::pin(self.advance(&key, &invocation)).await;
            let noticed = guarded(self.provider.noticed(payload), invocation.time_for_work()).await?;
            if let Some(request) = noticed {
                Box::pin(self.meet(json!({ "Request": request }), &invocation)).await?;
            }
            advanced
        } else {
            Err(Undone(
                "the payload is neither a CloudFormation request, an EventBridge event, a rule's request nor a schedule's tick".into(),
            ))
        }
    }

    /// Meets a rule's request, now or as soon as it can be.
    async fn meet(&self, payload: Value, invocation: &Invocation) -> Result<(), Undone> {
        let room = self.waiting_room()?;
        let key = format!("request-{}", &hex_digest([payload["Request"].to_string().as_str()])[..32]);
        let requested = guarded(self.provider.requested(&payload["Request"]), invocation.time_for_work()).await;
        match requested {
            Ok(Requested::Done) => {
                room.forget(&key).await?;
            }
            Ok(Requested::Later) => room.remind(&key, &payload, &invocation.function_arn).await?,
            Err(failure) if failure.transient => {
                room.remind(&key, &payload, &invocation.function_arn).await?;
                warn!(why = failure.reason, key, "the request is asked again in a minute");
            }
            Err(failure) => return Err(failure.into()),
        }
        Ok(())
    }

    async fn answer_request(&self, payload: Value, invocation: &Invocation) -> Result<(), Undone> {
        let callback: Callback = read_properties(payload.clone()).map_err(|why| {
            Undone(format!("the request cannot be answered: {why}; CloudFormation sends all of them"))
        })?;
        // What to report if the work below is cut off: it is set right before the provider may make something.
        let physical_id = RefCell::new(text(&payload, "PhysicalResourceId").unwrap_or(NOTHING_MADE).to_owned());
        let work = self.carry_out(&callback, &payload, &physical_id, invocation);
        let result = match guarded(work, invocation.time_for_work()).await {
            Ok(Done::Now(data)) => Ok(data),
            // The event may have come while the request was being put down: look once more. A failure here is no
            // answer: the request waits, and the next event or tick looks again.
            Ok(Done::Waits(key)) => {
                if let Err(undone) = Box::pin(self.advance(&key, invocation)).await {
                    warn!(why = undone.0, key, "the request waits for the next event or tick");
                }
                return Ok(());
            }
            Err(failure) => Err(failure.reason),
        };
        self.deliver(&callback, Outcome { physical_id: physical_id.into_inner(), result }, invocation)
            .await
            .map_err(|undelivered| Undone(undelivered.why))
    }

    /// Does what the request asks for.
    async fn carry_out(
        &self,
        callback: &Callback,
        payload: &Value,
        physical_id: &RefCell<String>,
        invocation: &Invocation,
    ) -> Result<Done, Failure> {
        let request_type = text(payload, "RequestType").unwrap_or_default();
        info!(request_type, logical_id = callback.logical_resource_id, request_id = callback.request_id, "request");
        if request_type == "Delete" && text(payload, "PhysicalResourceId") == Some(NOTHING_MADE) {
            return Ok(Done::Now(Value::Null));
        }
        let resource_type = text(payload, "ResourceType").unwrap_or_default();
        let properties = &payload["ResourceProperties"];
        let new = self.provider.read(resource_type, properties.clone()).map_err(Failure::new)?;
        let derived = derive_physical_id(callback, &self.provider.identity(&new));
        let resource = Resource { physical_id: derived.clone(), request_id: callback.request_id.clone() };
        let answer = match request_type {
            // The answer names the id that it was given, which after a Create that timed out is one of
            // CloudFormation's own invention.
            "Delete" => {
                let rest = self.provider.rest_of_delete(&resource, &new);
                self.provider.delete(&resource, new).await?;
                match rest {
                    None => return Ok(Done::Now(Value::Null)),
                    Some(awaited) => Answer::Later(awaited),
                }
            }
            "Create" | "Update" => {
                self.provider.check(&new).map_err(Failure::new)?;
                physical_id.replace(derived);
                if request_type == "Create" {
                    self.provider.create(&resource, new).await?
                } else {
                    let old = self.provider.read(resource_type, payload["OldResourceProperties"].clone()).ok();
                    self.provider.update(&resource, new, old).await?
                }
            }
            other => {
                return Err(Failure::new(format!(
                    "the request type should be Create, Update or Delete and is \"{other}\""
                )));
            }
        };
        match answer {
            Answer::Now(data) => to_value(data).map(Done::Now),
            Answer::Later(awaited) => {
                let service_timeout = text(properties, "ServiceTimeout").and_then(|seconds| seconds.parse().ok());
                let physical_id = physical_id.borrow().clone();
                self.defer(callback, physical_id, awaited, service_timeout, invocation).await
            }
        }
    }

    /// Puts a request into the waiting room, unless what it waits for has happened already.
    async fn defer(
        &self,
        callback: &Callback,
        physical_id: String,
        awaited: P::Awaited,
        service_timeout: Option<u64>,
        invocation: &Invocation,
    ) -> Result<Done, Failure> {
        let awaited = match self.provider.poll(&awaited).await {
            Ok(Progress::Ready(data)) => return to_value(data).map(Done::Now),
            Ok(Progress::Waiting(awaited)) => awaited,
            Err(failure) if failure.transient => awaited,
            Err(failure) => return Err(failure),
        };
        let deferral = Deferral {
            key: self.provider.key(&awaited),
            callback: callback.clone(),
            physical_id,
            awaited: to_value(awaited)?,
            gives_up_at: since_epoch().as_secs() + patience(service_timeout.unwrap_or(DEFAULT_SERVICE_TIMEOUT)),
        };
        self.waiting_room()?.put(&deferral, &invocation.function_arn).await?;
        Ok(Done::Waits(deferral.key))
    }

    /// Answers the request that waits under `key`, if what it waits for has happened or its time is over.
    async fn advance(&self, key: &str, invocation: &Invocation) -> Result<(), Undone> {
        let room = self.waiting_room()?;
        let Some(deferral) = room.find(key).await? else {
            info!(key, "nobody waits for this");
            return Ok(());
        };
        let awaited: P::Awaited = serde_json::from_value(deferral.awaited.clone())
            .map_err(|why| Undone(format!("the request that waits for {key} cannot be read: {why}")))?;
        let time_is_over = since_epoch().as_secs() >= deferral.gives_up_at;
        let result = match guarded(self.provider.poll(&awaited), invocation.time_for_work()).await {
            Ok(Progress::Ready(data)) => to_value(data),
            Ok(Progress::Waiting(awaited)) if time_is_over => self.provider.gave_up(&awaited).and_then(to_value),
            Ok(Progress::Waiting(awaited)) => {
                let awaited = to_value(awaited)?;
                // Replaced and not put: where it has been answered meanwhile, it must not come back.
                if awaited != deferral.awaited {
                    room.replace(&Deferral { awaited, ..deferral }, &invocation.function_arn).await?;
                }
                return Ok(());
            }
            Err(failure) if failure.transient && !time_is_over => {
                return Err(Undone(format!("{}; the next event or tick looks again", failure.reason)));
            }
            Err(failure) => Err(failure),
        };
        // Taking the request out of the room is the claim: of several invocations that get here, one answers.
        if !room.take(&deferral).await? {
            info!(key, "another invocation has answered");
            return Ok(());
        }
        let outcome =
            Outcome { physical_id: deferral.physical_id.clone(), result: result.map_err(|failure| failure.reason) };
        // With time left to put the request back where it was.
        let in_time = Invocation {
            deadline: invocation.deadline - PUTTING_BACK.min(invocation.left() / 2),
            ..invocation.clone()
        };
        match self.deliver(&deferral.callback, outcome, &in_time).await {
            Ok(()) => Ok(()),
            Err(undelivered) => {
                if undelivered.may_work_later {
                    room.put(&deferral, &invocation.function_arn).await?;
                }
                Err(Undone(undelivered.why))
            }
        }
    }

    fn waiting_room(&self) -> Result<&WaitingRoom, Failure> {
        self.waiting_room.as_ref().ok_or_else(|| {
            Failure::new(
                "the function cannot wait: SCHEDULE_GROUP and SCHEDULE_ROLE_ARN are not set in its environment",
            )
        })
    }

    /// Puts the answer to the response URL, trying again while the invocation's time lasts.
    async fn deliver(&self, callback: &Callback, outcome: Outcome, invocation: &Invocation) -> Result<(), Undelivered> {
        match &outcome.result {
            Ok(_) => info!(logical_id = callback.logical_resource_id, "SUCCESS"),
            Err(reason) => error!(logical_id = callback.logical_resource_id, reason, "FAILED"),
        }
        let body = answer_body(callback, outcome, &invocation.log);
        let mut pause = Duration::from_millis(100);
        loop {
            let undelivered = match self.put_once(callback, &body, invocation.deadline).await {
                Ok(()) => return Ok(()),
                Err(undelivered) => undelivered,
            };
            let wait = pause.mul_f64(0.5 + fastrand::f64());
            if !undelivered.may_work_later || Instant::now() + wait >= invocation.deadline {
                error!(why = undelivered.why, "the answer was not delivered");
                return Err(undelivered);
            }
            warn!(why = undelivered.why, "the answer was not delivered, trying again");
            tokio::time::sleep(wait).await;
            pause = (pause * 2).min(Duration::from_secs(10));
        }
    }

    async fn put_once(&self, callback: &Callback, body: &[u8], deadline: Instant) -> Result<(), Undelivered> {
        let unusable = |_| Undelivered { why: "the response URL is not a URL".into(), may_work_later: false };
        let mut request = HttpRequest::new(SdkBody::from(body));
        request.set_uri(callback.response_url.0.as_str()).map_err(unusable)?;
        request.set_method("PUT").map_err(|_| Undelivered::later("PUT is no method"))?;
        // The URL is signed for an empty content type: any other is refused.
        request.headers_mut().insert("content-type", "");
        request.headers_mut().insert("content-length", body.len().to_string());
        // One attempt may not use up the time of the next ones.
        let attempt = (deadline.saturating_duration_since(Instant::now()) / 2).min(Duration::from_secs(5));
        match tokio::time::timeout(attempt, self.http.call(request)).await {
            Err(_) => Err(Undelivered::later("the response URL did not answer in time")),
            Ok(Err(error)) if error.is_timeout() => {
                Err(Undelivered::later("connecting to the response URL took too long"))
            }
            // The error's own text may hold the URL.
            Ok(Err(_)) => Err(Undelivered::later("the connection to the response URL failed")),
            Ok(Ok(response)) => match response.status().as_u16() {
                200..=299 => Ok(()),
                status => Err(Undelivered {
                    why: format!("the response URL answered {status}"),
                    may_work_later: status >= 500 || status == 429,
                }),
            },
        }
    }
}

/// An answer that CloudFormation has not got.
struct Undelivered {
    why: String,
    may_work_later: bool,
}

impl Undelivered {
    fn later(why: &str) -> Self {
        Self { why: why.into(), may_work_later: true }
    }
}

/// The work's result; a panic and a time-out are failures too.
///
/// Boxed, since the futures of SDK calls within calls become types deeper than the compiler's limit.
async fn guarded<T>(work: impl Future<Output = Result<T, Failure>>, limit: Duration) -> Result<T, Failure> {
    match tokio::time::timeout(limit, AssertUnwindSafe(Box::pin(work)).catch_unwind()).await {
        Ok(Ok(result)) => result,
        Ok(Err(panic)) => Err(Failure::new(format!(
            "the function has a defect and panicked: {}. Please report it with the log",
            panic_text(panic.as_ref())
        ))),
        Err(_) => Err(Failure {
            transient: true,
            ..Failure::new(format!(
                "it was not finished after {} s, which is all the time that the function has; AWS may be slow just now, \
                 so try again",
                limit.as_secs_f32().round()
            ))
        }),
    }
}

fn panic_text(panic: &(dyn Any + Send)) -> &str {
    panic
        .downcast_ref::<&str>()
        .copied()
        .or_else(|| panic.downcast_ref::<String>().map(String::as_str))
        .unwrap_or("no message")
}

/// `stack-LogicalId-digest`: readable, and the same for the same stack, logical id and identity.
fn derive_physical_id(callback: &Callback, identity: &str) -> String {
    let stack_name = callback.stack_id.split('/').nth(1).unwrap_or("stack");
    let digest = hex_digest([&callback.stack_id, &callback.logical_resource_id, identity]);
    format!("{stack_name}-{}-{}", callback.logical_resource_id, &digest[..16])
}

/// SHA-256 of the parts in hexadecimal digits; where one ends and the next begins counts.
pub fn hex_digest<'a>(parts: impl IntoIterator<Item = &'a str>) -> String {
    let mut hasher = Sha256::new();
    for part in parts {
        hasher.update((part.len() as u64).to_be_bytes());
        hasher.update(part);
    }
    format!("{:x}", hasher.finalize())
}

/// Seconds that a request may wait when CloudFormation waits `service_timeout`: five minutes less, for the time
/// that the request was on its way, a tick that comes late, and the answer's own delivery.
fn patience(service_timeout: u64) -> u64 {
    service_timeout - (service_timeout / 4).min(300)
}

fn answer_body(callback: &Callback, outcome: Outcome, log: &str) -> Vec<u8> {
    let answer = |status: &str, reason: Option<&str>, data: &Value| {
        let mut answer = json!({
            "Status": status,
            "PhysicalResourceId": outcome.physical_id,
            "StackId": callback.stack_id,
            "RequestId": callback.request_id,
            "LogicalResourceId": callback.logical_resource_id,
        });
        if let Some(reason) = reason {
            answer["Reason"] = reason.into();
        }
        if !data.is_null() {
            answer["Data"] = data.clone();
        }
        answer.to_string().into_bytes()
    };
    let reason = match &outcome.result {
        Ok(data) => {
            let body = answer("SUCCESS", None, data);
            if body.len() <= ANSWER_LIMIT {
                return body;
            }
            format!("the answer takes {} bytes with its Data, and CloudFormation takes {ANSWER_LIMIT}", body.len())
        }
        Err(reason) => reason.clone(),
    };
    let failed = |kept: usize| {
        let cut = if kept < reason.len() { "…" } else { "" };
        answer("FAILED", Some(&format!("{}{cut} ({log})", &reason[..reason.floor_char_boundary(kept)])), &Value::Null)
    };
    let body = failed(reason.len());
    if body.len() <= ANSWER_LIMIT {
        return body;
    }
    // As much as fits. How many bytes a character takes is known only once it is escaped.
    let (mut fits, mut does_not) = (0, reason.len().min(ANSWER_LIMIT));
    while fits + 1 < does_not {
        let half = (fits + does_not) / 2;
        if failed(half).len() <= ANSWER_LIMIT {
            fits = half;
        } else {
            does_not = half;
        }
    }
    failed(fits)
}

/// Reads typed properties; the error names the property.
pub fn read_properties<T: DeserializeOwned>(properties: Value) -> Result<T, String> {
    serde_path_to_error::deserialize(properties).map_err(|error| match error.path().to_string() {
        path if path == "." => error.inner().to_string().replace('`', "\""),
        path => format!("property {path}: {}", error.inner()),
    })
}

/// Reads a scalar, which CloudFormation always sends as a string. For `#[serde(deserialize_with)]`.
pub fn scalar<'de, T, D>(deserializer: D) -> Result<T, D::Error>
where
    T: FromStr,
    T::Err: Display,
    D: Deserializer<'de>,
{
    let text = String::deserialize(deserializer)?;
    text.parse().map_err(|why| serde::de::Error::custom(format!("\"{text}\": {why}")))
}

/// The detail of an EventBridge event; `subject` is what the function needs it to name.
pub fn detail_of<T: DeserializeOwned + Serialize>(event: &Value, subject: &str) -> Result<T, Failure> {
    EventBridgeEvent::deserialize(event)
        .map(|event| event.detail)
        .map_err(|why| Failure::new(format!("the event does not name {subject}: {why}")))
}

fn to_value<T: Serialize>(data: T) -> Result<Value, Failure> {
    serde_json::to_value(data).map_err(|why| Failure::new(format!("the function has a defect: {why}")))
}

fn text<'a>(value: &'a Value, name: &str) -> Option<&'a str> {
    value.get(name).and_then(Value::as_str)
}

fn since_epoch() -> Duration {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default()
}

#[cfg(test)]
#[path = "custom_resource_tests.rs"]
mod tests;
