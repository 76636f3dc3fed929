//! The protocol as CloudFormation sees it: a real server takes the answers, and a test looks at nothing else.

use super::*;
use lambda_runtime::Context;
use serde_json::json;
use std::io::{BufRead, BufReader, Write};
use std::net::TcpListener;
use std::sync::{Arc, Mutex};
use std::thread;

const LIMIT: usize = 4096;

/// What arrived at the response URL.
#[derive(Clone, Debug)]
struct Arrived {
    method: String,
    content_type: Option<String>,
    body: String,
}

impl Arrived {
    fn json(&self) -> Value {
        serde_json::from_str(&self.body).unwrap()
    }
}

/// A response URL. It answers with the given statuses, one after the other, the last one for ever; a status of 0
/// closes the connection, 1 never answers.
struct ResponseUrl {
    url: String,
    arrived: Arc<Mutex<Vec<Arrived>>>,
}

impl ResponseUrl {
    fn new(statuses: &'static [u16]) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let url = format!("http://{}/answer?signature=very-secret", listener.local_addr().unwrap());
        let arrived = Arc::new(Mutex::new(Vec::new()));
        let kept = arrived.clone();
        thread::spawn(move || {
            let mut hanging = Vec::new();
            for (number, stream) in listener.incoming().enumerate() {
                let mut stream = stream.unwrap();
                kept.lock().unwrap().push(read_request(&mut BufReader::new(&stream)));
                match statuses[number.min(statuses.len() - 1)] {
                    0 => {}
                    1 => hanging.push(stream),
                    status => {
                        let head =
                            format!("HTTP/1.1 {status} status\r\ncontent-length: 0\r\nconnection: close\r\n\r\n");
                        stream.write_all(head.as_bytes()).unwrap();
                    }
                }
            }
        });
        Self { url, arrived }
    }

    fn arrived(&self) -> Vec<Arrived> {
        self.arrived.lock().unwrap().clone()
    }

    /// The one answer.
    fn answer(&self) -> Value {
        let arrived = self.arrived();
        assert_eq!(arrived.len(), 1, "exactly one answer: {arrived:?}");
        assert_eq!(arrived[0].method, "PUT");
        assert!(arrived[0].body.len() <= LIMIT, "CloudFormation takes {LIMIT} bytes");
        arrived[0].json()
    }
}

fn read_request(reader: &mut impl BufRead) -> Arrived {
    let mut line = String::new();
    reader.read_line(&mut line).unwrap();
    let method = line.split(' ').next().unwrap().to_owned();
    let (mut content_type, mut length) = (None, 0);
    loop {
        let mut header = String::new();
        reader.read_line(&mut header).unwrap();
        let Some((name, value)) = header.trim_end().split_once(':') else { break };
        match name.to_lowercase().as_str() {
            "content-type" => content_type = Some(value.trim().to_owned()),
            "content-length" => length = value.trim().parse().unwrap(),
            _ => {}
        }
    }
    let mut body = vec![0; length];
    reader.read_exact(&mut body).unwrap();
    Arrived { method, content_type, body: String::from_utf8(body).unwrap() }
}

/// A provider that does what its property `Do` says.
#[derive(Default)]
struct Obedient {
    calls: Mutex<Vec<String>>,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Properties {
    r#do: String,
    #[serde(default)]
    text: String,
    #[serde(default, deserialize_with = "scalar")]
    count: u32,
    #[serde(default, deserialize_with = "scalar")]
    flag: bool,
    #[serde(default)]
    identity: String,
}

impl Obedient {
    async fn obey(&self, verb: &str, resource: &Resource, properties: Properties) -> Result<Value, Failure> {
        self.calls.lock().unwrap().push(format!("{verb} {}", resource.physical_id));
        match properties.r#do.as_str() {
            "succeed" => Ok(json!({ "Text": properties.text, "Count": properties.count, "Flag": properties.flag })),
            "give large data" => Ok(json!({ "Text": "x".repeat(5000) })),
            "fail" => Err(Failure::new(properties.text)),
            "fail at length" => Err(Failure::new("ä\"\n".repeat(100_000))),
            "panic" => panic!("a defect"),
            "hang" => std::future::pending().await,
            other => panic!("cannot {other}"),
        }
    }
}

impl Provider for Obedient {
    type Properties = Properties;
    type Data = Value;
    type Awaited = ();

    fn read(&self, _: &str, properties: Value) -> Result<Properties, String> {
        read_properties(properties)
    }

    fn check(&self, new: &Properties) -> Result<(), String> {
        if new.r#do == "be refused" { Err("property Do: should be something else".into()) } else { Ok(()) }
    }

    fn identity(&self, properties: &Properties) -> String {
        properties.identity.clone()
    }

    async fn create(&self, resource: &Resource, new: Properties) -> Result<Answer<Self>, Failure> {
        self.obey("create", resource, new).await.map(Answer::Now)
    }

    async fn update(
        &self,
        resource: &Resource,
        new: Properties,
        old: Option<Properties>,
    ) -> Result<Answer<Self>, Failure> {
        let verb = if old.is_some() { "update" } else { "update from unreadable" };
        self.obey(verb, resource, new).await.map(Answer::Now)
    }

    async fn delete(&self, resource: &Resource, old: Properties) -> Result<(), Failure> {
        self.obey("delete", resource, old).await.map(|_| ())
    }
}

fn request(url: &str, request_type: &str, properties: Value) -> Value {
    json!({
        "RequestType": request_type,
        "ResponseURL": url,
        "StackId": "arn:aws:cloudformation:us-east-1:123456789012:stack/my-stack/1d1b2c10",
        "RequestId": "4b90a7e4-0000-4000-8000-000000000000",
        "LogicalResourceId": "Thing",
        "ResourceType": "Custom::Thing",
        "ResourceProperties": properties,
    })
}

/// Invokes a function that has `seconds` left on the clock.
async fn invoke(provider: &Function<Obedient>, payload: Value, seconds: u64) -> Result<(), Undone> {
    let mut context = Context::default();
    context.deadline = (since_epoch() + Duration::from_secs(seconds)).as_millis() as u64;
    provider.handle(LambdaEvent::new(payload, context)).await
}

fn function() -> Function<Obedient> {
    Function::new(Obedient::default(), http_connector(), None)
}

/// Sends one request to a new function; gives the one answer and what the provider was asked.
async fn answer_to(request_type: &str, properties: Value, more: Value, seconds: u64) -> (Value, Vec<String>) {
    let url = ResponseUrl::new(&[200]);
    let mut payload = request(&url.url, request_type, properties);
    payload.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    let function = function();
    invoke(&function, payload, seconds).await.unwrap();
    (url.answer(), function.provider.calls.into_inner().unwrap())
}

#[tokio::test]
async fn a_create_that_succeeds_is_answered_with_its_data_and_a_derived_physical_id() {
    let (answer, calls) = answer_to("Create", json!({ "Do": "succeed", "Text": "t" }), json!({}), 30).await;
    assert_eq!(answer["Status"], "SUCCESS");
    assert_eq!(answer["Data"], json!({ "Text": "t", "Count": 0, "Flag": false }));
    assert_eq!(answer["StackId"], "arn:aws:cloudformation:us-east-1:123456789012:stack/my-stack/1d1b2c10");
    assert_eq!(answer["RequestId"], "4b90a7e4-0000-4000-8000-000000000000");
    assert_eq!(answer["LogicalResourceId"], "Thing");
    let id = answer["PhysicalResourceId"].as_str().unwrap();
    assert!(id.starts_with("my-stack-Thing-"), "{id}");
    assert_eq!(calls, [format!("create {id}")]);
}

#[tokio::test]
async fn a_repeated_create_gives_the_same_physical_id_and_another_identity_another_one() {
    let id = async |identity: &str| {
        let properties = json!({ "Do": "succeed", "Identity": identity });
        answer_to("Create", properties, json!({}), 30).await.0["PhysicalResourceId"].clone()
    };
    assert_eq!(id("a").await, id("a").await);
    assert_ne!(id("a").await, id("b").await);
}

#[tokio::test]
async fn scalars_are_read_from_strings_as_cloudformation_sends_them() {
    let properties = json!({ "Do": "succeed", "Count": "3", "Flag": "true", "ServiceToken": "arn" });
    let (answer, _) = answer_to("Create", properties, json!({}), 30).await;
    assert_eq!(answer["Data"], json!({ "Text": "", "Count": 3, "Flag": true }));
}

#[tokio::test]
async fn a_bad_property_is_refused_by_name_before_the_provider_is_asked() {
    for (properties, expected) in [
        (json!({ "Do": "succeed", "Count": "many" }), "property Count: \"many\": invalid digit"),
        (json!({ "Do": "succeed", "Flag": "perhaps" }), "property Flag: \"perhaps\""),
        (json!({ "Text": "no verb" }), "missing field \"Do\""),
        (json!({ "Do": ["succeed"] }), "property Do: invalid type: sequence, expected a string"),
        (json!({ "Do": "be refused" }), "property Do: should be something else"),
        (Value::Null, "expected struct Properties"),
    ] {
        let (answer, calls) = answer_to("Create", properties, json!({}), 30).await;
        assert_eq!(answer["Status"], "FAILED");
        let reason = answer["Reason"].as_str().unwrap();
        assert!(reason.contains(expected), "{reason} should contain {expected}");
        assert_eq!(answer["PhysicalResourceId"], NOTHING_MADE);
        assert!(calls.is_empty());
    }
}

#[tokio::test]
async fn the_delete_after_a_refused_create_succeeds_without_asking_the_provider() {
    let (answer, calls) =
        answer_to("Delete", json!({ "Text": "no verb" }), json!({ "PhysicalResourceId": NOTHING_MADE }), 30).await;
    assert_eq!(answer["Status"], "SUCCESS");
    assert_eq!(answer["PhysicalResourceId"], NOTHING_MADE);
    assert!(calls.is_empty());
}

#[tokio::test]
async fn a_create_that_fails_midway_carries_the_id_by_which_the_delete_finds_what_was_made() {
    for verb in ["fail", "panic"] {
        let (failed, _) = answer_to("Create", json!({ "Do": verb }), json!({}), 30).await;
        assert_eq!(failed["Status"], "FAILED");
        let (done, _) = answer_to("Create", json!({ "Do": "succeed" }), json!({}), 30).await;
        assert_eq!(failed["PhysicalResourceId"], done["PhysicalResourceId"], "{verb}");
    }
}

#[tokio::test]
async fn a_delete_finds_what_the_create_made_and_answers_with_the_id_that_it_was_given() {
    let (created, _) = answer_to("Create", json!({ "Do": "succeed" }), json!({}), 30).await;
    let made = created["PhysicalResourceId"].as_str().unwrap();
    // The second is CloudFormation's own, after a Create that was never answered.
    for given in [made, "my-stack-Thing-1ABCDEFGHIJKL"] {
        let more = json!({ "PhysicalResourceId": given });
        let (answer, calls) = answer_to("Delete", json!({ "Do": "succeed" }), more, 30).await;
        assert_eq!(answer["PhysicalResourceId"], given);
        assert_eq!(answer.get("Data"), None);
        assert_eq!(calls, [format!("delete {made}")]);
    }
}

#[tokio::test]
async fn a_delete_is_not_refused_for_properties_that_would_be_refused_today() {
    let properties = json!({ "Do": "be refused" });
    let (_, calls) = answer_to("Delete", properties, json!({ "PhysicalResourceId": "it" }), 30).await;
    assert!(calls[0].starts_with("delete my-stack-Thing-"));
}

#[tokio::test]
async fn an_update_refused_keeps_the_physical_id_so_that_nothing_is_replaced() {
    let more = json!({ "PhysicalResourceId": "it", "OldResourceProperties": { "Do": "succeed" } });
    let (answer, calls) = answer_to("Update", json!({ "Do": "be refused" }), more, 30).await;
    assert_eq!(answer["Status"], "FAILED");
    assert_eq!(answer["PhysicalResourceId"], "it");
    assert!(calls.is_empty());
}

#[tokio::test]
async fn an_update_after_one_that_was_refused_works_though_the_old_properties_cannot_be_read() {
    let more = json!({ "PhysicalResourceId": "it", "OldResourceProperties": { "Count": "many" } });
    let (answer, calls) = answer_to("Update", json!({ "Do": "succeed" }), more, 30).await;
    assert_eq!(answer["Status"], "SUCCESS");
    assert!(calls[0].starts_with("update from unreadable my-stack-Thing-"));
}

#[tokio::test]
async fn a_failure_is_told_in_its_own_words_with_the_log_to_look_at() {
    let properties = json!({ "Do": "fail", "Text": "bucket b does not exist; create it before seeding" });
    let (answer, _) = answer_to("Create", properties, json!({}), 30).await;
    let reason = answer["Reason"].as_str().unwrap();
    assert!(reason.starts_with("bucket b does not exist; create it before seeding (log group "), "{reason}");
}

#[tokio::test]
async fn a_panic_becomes_an_answer() {
    let (answer, _) = answer_to("Create", json!({ "Do": "panic" }), json!({}), 30).await;
    assert_eq!(answer["Status"], "FAILED");
    assert!(answer["Reason"].as_str().unwrap().contains("panicked: a defect"));
}

#[tokio::test]
async fn a_dependency_that_hangs_is_answered_before_the_functions_own_deadline() {
    let started = Instant::now();
    let (answer, _) = answer_to("Create", json!({ "Do": "hang" }), json!({}), 2).await;
    assert_eq!(answer["Status"], "FAILED");
    assert!(answer["Reason"].as_str().unwrap().contains("all the time that the function has"));
    assert!(started.elapsed() < Duration::from_secs(2), "{:?}", started.elapsed());
}

#[tokio::test]
async fn an_unknown_request_type_is_answered() {
    let (answer, calls) = answer_to("Import", json!({ "Do": "succeed" }), json!({}), 30).await;
    assert_eq!(answer["Status"], "FAILED");
    assert!(answer["Reason"].as_str().unwrap().contains("should be Create, Update or Delete and is \"Import\""));
    assert!(calls.is_empty());
}

#[tokio::test]
async fn a_reason_that_is_too_long_is_cut_between_characters_and_keeps_its_beginning_and_the_log() {
    let (answer, _) = answer_to("Create", json!({ "Do": "fail at length" }), json!({}), 30).await;
    let reason = answer["Reason"].as_str().unwrap();
    assert!(reason.starts_with("ä\"\nä\"\n") && reason.contains("… (log group "), "{reason}");
    assert!(answer.to_string().len() > LIMIT - 20, "no more is cut than has to be");
}

#[tokio::test]
async fn data_that_is_too_large_is_never_cut_but_refused() {
    let (answer, _) = answer_to("Create", json!({ "Do": "give large data" }), json!({}), 30).await;
    assert_eq!(answer["Status"], "FAILED");
    assert_eq!(answer.get("Data"), None);
    assert!(answer["Reason"].as_str().unwrap().contains("CloudFormation takes 4096"));
}

#[tokio::test]
async fn the_answer_is_put_with_an_empty_content_type() {
    let url = ResponseUrl::new(&[200]);
    invoke(&function(), request(&url.url, "Create", json!({ "Do": "succeed" })), 30).await.unwrap();
    assert_eq!(url.arrived()[0].content_type.as_deref().unwrap_or_default(), "");
}

#[tokio::test]
async fn an_answer_is_put_again_until_the_response_url_takes_it() {
    let url = ResponseUrl::new(&[500, 503, 0, 429, 200]);
    invoke(&function(), request(&url.url, "Create", json!({ "Do": "succeed" })), 30).await.unwrap();
    let arrived = url.arrived();
    assert_eq!(arrived.len(), 5);
    assert!(arrived.iter().all(|one| one.body == arrived[0].body));
}

#[tokio::test]
async fn a_response_url_that_hangs_once_is_tried_again_in_time() {
    let url = ResponseUrl::new(&[1, 200]);
    invoke(&function(), request(&url.url, "Create", json!({ "Do": "succeed" })), 4).await.unwrap();
    assert_eq!(url.arrived().len(), 2);
}

#[tokio::test]
async fn an_answer_that_is_never_taken_fails_the_invocation_before_the_deadline_without_telling_the_url() {
    for statuses in [&[500_u16][..], &[1], &[0]] {
        let url = ResponseUrl::new(match statuses[0] {
            500 => &[500],
            1 => &[1],
            _ => &[0],
        });
        let started = Instant::now();
        let undone = invoke(&function(), request(&url.url, "Create", json!({ "Do": "succeed" })), 2).await.unwrap_err();
        assert!(started.elapsed() < Duration::from_secs(2));
        assert!(!format!("{undone:?}").contains("very-secret"), "{undone:?}");
        assert!(url.arrived().len() > 1, "it was tried again");
    }
}

#[tokio::test]
async fn an_answer_that_is_refused_for_good_is_not_put_again() {
    let url = ResponseUrl::new(&[403]);
    let undone = invoke(&function(), request(&url.url, "Create", json!({ "Do": "succeed" })), 30).await.unwrap_err();
    assert_eq!(undone.0, "the response URL answered 403");
    assert_eq!(url.arrived().len(), 1);
}

#[tokio::test]
async fn a_payload_that_is_none_of_ours_is_an_error_that_says_so() {
    let undone = invoke(&function(), json!({ "hello": "world" }), 30).await.unwrap_err();
    assert!(undone.0.contains("neither a CloudFormation request"));
    let undone = invoke(&function(), json!({ "ResponseURL": "http://127.0.0.1:1/" }), 30).await.unwrap_err();
    assert!(undone.0.contains("missing field \"StackId\""), "{}", undone.0);
}

#[test]
fn the_response_url_is_not_shown_where_a_callback_is() {
    let payload = request("https://bucket/very-secret", "Create", json!({}));
    let callback: Callback = serde_json::from_value(payload).unwrap();
    assert!(!format!("{callback:?}").contains("very-secret"));
}

#[test]
fn cloudformation_waits_longer_than_the_request_does() {
    assert_eq!(patience(3600), 3300);
    assert_eq!(patience(400), 300);
    assert_eq!(patience(1), 1);
}
