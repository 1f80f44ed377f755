//! The API's description holds: it is the server's, and the server keeps to it, whatever comes.
#![allow(clippy::unwrap_used)]

mod served;

use std::time::Duration;

use army_api::vms::{Vm, VmState};
use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};
use reqwest::Method;
use serde_json::{Map, Value, json};

use served::Server;

/// Requests for each operation.
const CASES: u32 = 40;
/// How deep a value may be nested that is made of a schema.
const DEPTH: u32 = 4;
/// How much of an answer that goes on and on is waited for.
const PATIENCE: Duration = Duration::from_secs(10);
/// Answers that never end, and one that is no HTTP after its first line.
const ENDLESS: [&str; 2] = ["text/event-stream", "text/plain"];

#[test]
fn the_description_in_the_repository_is_the_servers() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/openapi.json");
    let kept = std::fs::read_to_string(path).unwrap_or_default();
    let served = army::server::openapi().to_pretty_json().unwrap();
    assert!(
        kept.trim_end() == served.trim_end(),
        "crates/army/openapi.json is not what the server says; after looking at what changed: \
         cargo run -q -p army openapi > crates/army/openapi.json"
    );
}

/// A request as it is sent.
#[derive(Debug, Clone)]
struct Asked {
    path: String,
    query: Vec<(String, String)>,
    body: Option<Value>,
}

#[tokio::test(flavor = "multi_thread")]
async fn whatever_is_asked_the_answer_is_one_that_is_described() {
    let server = served::server(None).await;
    let names = furnish(&server).await;
    let document = serde_json::to_value(army::server::openapi()).unwrap();
    let mut operations = 0;
    let mut wrong = Vec::new();
    for (path, methods) in document["paths"].as_object().unwrap() {
        for (method, operation) in methods.as_object().unwrap() {
            let strategy = requests(&document, path, operation, &names);
            let method = Method::from_bytes(method.to_uppercase().as_bytes()).unwrap();
            wrong.extend(check(&server, &document, &method, operation, &strategy));
            operations += 1;
        }
    }
    assert!(operations > 30, "{operations}");
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

/// Puts things there to be asked for; returns their names.
async fn furnish(server: &Server) -> Vec<String> {
    server
        .records
        .insert_template(&served::template("t"))
        .await
        .unwrap();
    server.records.tag("latest", "t").await.unwrap();
    let vm = Vm {
        id: "0a0b0c0d0e0f".into(),
        name: "a".into(),
        tenant: "root".into(),
        template: "t".into(),
        host: "here".into(),
        state: VmState::Running,
        reason: None,
        labels: [("team".to_owned(), "red".to_owned())].into(),
        created_ms: 1,
        expires_ms: Some(2),
        network: Some(army_api::vms::NetworkPolicy {
            egress: army_api::vms::Egress::Allow(vec!["10.0.0.0/8".into()]),
            host: false,
        }),
        idle: None,
        fork: None,
        addresses: Vec::new(),
        notices: vec!["no disk".into()],
        memory: None,
    };
    let environment = [("A".to_owned(), "B".to_owned())].into();
    let vms = std::slice::from_ref(&vm);
    server.records.insert_vms(vms, &environment).await.unwrap();
    ["t", "latest", "a", "0a0b0c0d0e0f", "here", "none", "1"]
        .map(str::to_owned)
        .into()
}

fn check(
    server: &Server,
    document: &Value,
    method: &Method,
    operation: &Value,
    strategy: &BoxedStrategy<Asked>,
) -> Option<String> {
    // The same requests in each run.
    let mut runner = TestRunner::new_with_rng(
        Config {
            cases: CASES,
            failure_persistence: None,
            ..Config::default()
        },
        proptest::test_runner::TestRng::deterministic_rng(
            proptest::test_runner::RngAlgorithm::ChaCha,
        ),
    );
    let outcome = tokio::task::block_in_place(|| {
        runner.run(strategy, |asked| {
            let answer = tokio::runtime::Handle::current().block_on(send(server, method, &asked));
            let judged = judge(document, operation, &answer);
            judged.map_err(|why| TestCaseError::fail(format!("{method} {asked:?}: {why}")))
        })
    });
    outcome.err().map(|error| error.to_string())
}

/// Status, type and body of an answer.
type Answer = (u16, String, Vec<u8>);

async fn send(server: &Server, method: &Method, asked: &Asked) -> Answer {
    let mut request = reqwest::Client::new()
        .request(method.clone(), format!("{}{}", server.url, asked.path))
        .bearer_auth(server.admin.key())
        .query(&asked.query);
    if let Some(body) = &asked.body {
        request = request.json(body);
    }
    let answer = tokio::time::timeout(PATIENCE, request.send());
    let answer = answer.await.expect("no answer came").unwrap();
    let status = answer.status().as_u16();
    let kind = answer.headers().get("content-type");
    let kind = kind.map_or("", |kind| kind.to_str().unwrap()).to_owned();
    let body = match ENDLESS.iter().any(|endless| kind.starts_with(endless)) {
        true => Vec::new(),
        false => answer.bytes().await.unwrap().to_vec(),
    };
    (status, kind, body)
}

fn judge(document: &Value, operation: &Value, answer: &Answer) -> Result<(), String> {
    let (status, kind, body) = answer;
    let described = &operation["responses"];
    let exact = &described[status.to_string()];
    let expected = match exact {
        Value::Null => &described[format!("{}XX", status / 100)],
        exact => exact,
    };
    let text = String::from_utf8_lossy(body);
    if *status >= 500 || expected.is_null() {
        return Err(format!("{status} is not described: {text}"));
    }
    let essence = kind.split(';').next().unwrap_or_default();
    let schema = &expected["content"][essence]["schema"];
    if expected["content"].is_object() && expected["content"][essence].is_null() {
        return Err(format!("{status} comes as `{kind}`: {text}"));
    }
    if schema.is_null() || !essence.ends_with("json") {
        return Ok(());
    }
    let value: Value = serde_json::from_slice(body).map_err(|error| format!("{error}: {text}"))?;
    // References lead into the document.
    let schema = json!({"allOf": [schema], "components": document["components"]});
    let validator = jsonschema::validator_for(&schema).unwrap();
    let wrong = validator.iter_errors(&value).next();
    wrong.map_or(Ok(()), |wrong| Err(format!("{wrong}: {text}")))
}

/// Requests as they are described, with now and then something else in them.
fn requests(
    document: &Value,
    path: &str,
    operation: &Value,
    names: &[String],
) -> BoxedStrategy<Asked> {
    let mut in_path = Vec::new();
    let mut in_query = Vec::new();
    for parameter in operation["parameters"].as_array().into_iter().flatten() {
        let name = parameter["name"].as_str().unwrap().to_owned();
        match parameter["in"].as_str().unwrap() {
            "path" => in_path.push((name, word(names))),
            "query" => {
                let value = value(document, &parameter["schema"], names, DEPTH).prop_map(plain);
                in_query.push(prop::option::of(
                    value.prop_map(move |it| (name.clone(), it)),
                ));
            }
            _ => {}
        }
    }
    let schema = &operation["requestBody"]["content"]["application/json"]["schema"];
    let body = match schema {
        Value::Null => Just(None).boxed(),
        schema => prop_oneof![
            8 => value(document, schema, names, DEPTH),
            1 => anything(),
        ]
        .prop_map(Some)
        .boxed(),
    };
    let (places, words): (Vec<_>, Vec<_>) = in_path.into_iter().unzip();
    let path = path.to_owned();
    (words, in_query, body)
        .prop_map(move |(words, query, body)| {
            let mut whole = path.clone();
            for (place, word) in places.iter().zip(words) {
                whole = whole.replace(&format!("{{{place}}}"), &escaped(&word));
            }
            Asked {
                path: whole,
                query: query.into_iter().flatten().collect(),
                body,
            }
        })
        .boxed()
}

/// Names of what is there, and others.
fn word(names: &[String]) -> BoxedStrategy<String> {
    prop_oneof![
        4 => prop::sample::select(names.to_vec()),
        1 => "[a-z][a-z0-9-]{0,12}",
        1 => "\\PC{1,20}",
        1 => Just("../../etc/passwd".to_owned()),
    ]
    .boxed()
}

/// A value that a schema describes.
fn value(document: &Value, schema: &Value, names: &[String], depth: u32) -> BoxedStrategy<Value> {
    if let Some(target) = schema["$ref"].as_str() {
        let target = document.pointer(target.strip_prefix('#').unwrap()).unwrap();
        return value(document, target, names, depth);
    }
    if let Some(values) = schema["enum"].as_array() {
        return prop::sample::select(values.clone()).boxed();
    }
    if let Some(choices) = schema["oneOf"].as_array() {
        let choices = choices.iter().map(|it| value(document, it, names, depth));
        return prop::strategy::Union::new(choices).boxed();
    }
    let kind = match &schema["type"] {
        Value::Array(kinds) => kinds.iter().find(|kind| *kind != "null").unwrap().clone(),
        kind => kind.clone(),
    };
    match kind.as_str() {
        Some("null") => Just(Value::Null).boxed(),
        Some("boolean") => any::<bool>().prop_map(Value::from).boxed(),
        Some("integer") => {
            let least = schema["minimum"].as_i64().unwrap_or(0);
            let most = schema["maximum"].as_i64().unwrap_or(i64::MAX);
            let edges = prop::sample::select(vec![least, most, least - 1, least + 1]);
            prop_oneof![3 => least..=most.min(least.saturating_add(20_000)), 1 => edges]
                .prop_map(Value::from)
                .boxed()
        }
        Some("number") => any::<f64>().prop_map(|it| json!(it)).boxed(),
        Some("string") => word(names).prop_map(Value::from).boxed(),
        Some("array") if depth > 0 => {
            let item = value(document, &schema["items"], names, depth - 1);
            prop::collection::vec(item, 0..4)
                .prop_map(Value::from)
                .boxed()
        }
        Some("object") if depth > 0 => object(document, schema, names, depth - 1),
        _ => anything(),
    }
}

fn object(document: &Value, schema: &Value, names: &[String], depth: u32) -> BoxedStrategy<Value> {
    let required = schema["required"].as_array().cloned().unwrap_or_default();
    let fields: Vec<_> = schema["properties"]
        .as_object()
        .into_iter()
        .flatten()
        .map(|(name, schema)| {
            let value = value(document, schema, names, depth);
            let always = required.iter().any(|it| it == name.as_str());
            let present = if always { 0.95 } else { 0.4 };
            let name = name.clone();
            prop::option::weighted(present, value.prop_map(move |it| (name.clone(), it)))
        })
        .collect();
    let more = match &schema["additionalProperties"] {
        more @ Value::Object(_) => {
            prop::collection::vec((word(names), value(document, more, names, depth)), 0..3).boxed()
        }
        _ => Just(Vec::new()).boxed(),
    };
    (fields, more)
        .prop_map(|(fields, more)| {
            let fields = fields.into_iter().flatten().chain(more);
            Value::Object(fields.collect::<Map<_, _>>())
        })
        .boxed()
}

/// JSON that nobody asked for.
fn anything() -> BoxedStrategy<Value> {
    prop::sample::select(vec![
        Value::Null,
        json!([]),
        json!({}),
        json!(true),
        json!(-1),
        json!(1e300),
        json!("\u{0}"),
        json!({"surprise": [[[{}]]]}),
    ])
    .boxed()
}

fn plain(value: Value) -> String {
    match value {
        Value::String(text) => text,
        other => other.to_string(),
    }
}

/// A word as one part of a path.
fn escaped(word: &str) -> String {
    let bytes = word.bytes().map(|byte| match byte {
        b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' => char::from(byte).to_string(),
        other => format!("%{other:02X}"),
    });
    bytes.collect()
}
