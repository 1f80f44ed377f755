//! Every limit of the API's description is enforced: the document is walked, and each limit of each
//! request is tried from both sides.
#![allow(clippy::unwrap_used)]

mod served;

use army_api::{Problem, ProblemKind};
use reqwest::Method;
use serde_json::{Map, Value, json};

use served::Server;

/// A value that is at a limit, or just beyond it.
#[derive(Debug, Clone)]
struct Variant {
    /// The limit, for messages.
    limit: String,
    value: Value,
    is_allowed: bool,
}

impl Variant {
    fn new(limit: &str, value: impl Into<Value>, is_allowed: bool) -> Self {
        Self {
            limit: limit.to_owned(),
            value: value.into(),
            is_allowed,
        }
    }

    /// The same variant as a part of a larger value.
    fn within(mut self, place: &str, whole: impl FnOnce(Value) -> Value) -> Self {
        self.limit = format!("{place}.{}", self.limit);
        self.value = whole(self.value);
        self
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn each_limit_of_the_description_is_enforced_on_both_sides() {
    let server = served::server(None).await;
    let document = serde_json::to_value(army::server::openapi()).unwrap();
    let (mut tried, mut wrong) = (0, Vec::new());
    for (path, methods) in document["paths"].as_object().unwrap() {
        for (method, operation) in methods.as_object().unwrap() {
            let method = Method::from_bytes(method.to_uppercase().as_bytes()).unwrap();
            let schema = &operation["requestBody"]["content"]["application/json"]["schema"];
            for variant in variants(&document, schema) {
                let judged = try_body(&server, &method, path, &variant).await;
                wrong.extend(judged.err());
                tried += 1;
            }
            for parameter in operation["parameters"].as_array().into_iter().flatten() {
                if parameter["in"] != "query" {
                    continue;
                }
                for variant in variants(&document, &parameter["schema"]) {
                    let others = required_beside(&document, operation, parameter);
                    let query = try_query(&server, &method, path, parameter, &variant, others);
                    let judged = query.await;
                    wrong.extend(judged.err());
                    tried += 1;
                }
            }
        }
    }
    assert!(tried > 40, "{tried}");
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

async fn try_body(
    server: &Server,
    method: &Method,
    path: &str,
    variant: &Variant,
) -> Result<(), String> {
    let request = request(server, method, path).json(&variant.value);
    let judged = judge(request, variant.is_allowed).await;
    judged.map_err(|why| format!("{method} {path} {}: {why}", variant.limit))
}

async fn try_query(
    server: &Server,
    method: &Method,
    path: &str,
    parameter: &Value,
    variant: &Variant,
    mut query: Vec<(String, String)>,
) -> Result<(), String> {
    let name = parameter["name"].as_str().unwrap();
    query.push((name.to_owned(), text(&variant.value)));
    let request = request(server, method, path).query(&query);
    let judged = judge(request, variant.is_allowed).await;
    judged.map_err(|why| format!("{method} {path} {name} {}: {why}", variant.limit))
}

/// The other parameters of the query that the operation requires, each as small as possible.
fn required_beside(
    document: &Value,
    operation: &Value,
    parameter: &Value,
) -> Vec<(String, String)> {
    let all = operation["parameters"].as_array().into_iter().flatten();
    let others = all.filter(|it| {
        it["in"] == "query" && it["required"] == true && it["name"] != parameter["name"]
    });
    let values = others.map(|it| {
        let name = it["name"].as_str().unwrap().to_owned();
        (name, text(&least(document, &it["schema"])))
    });
    values.collect()
}

fn text(value: &Value) -> String {
    match value {
        Value::String(text) => text.clone(),
        other => other.to_string(),
    }
}

fn request(server: &Server, method: &Method, path: &str) -> reqwest::RequestBuilder {
    let mut path = path.to_owned();
    while let (Some(from), Some(to)) = (path.find('{'), path.find('}')) {
        path.replace_range(from..=to, "1");
    }
    reqwest::Client::new()
        .request(method.clone(), format!("{}{path}", server.url))
        .bearer_auth(server.admin.key())
}

/// Whether a request was refused for a limit, exactly where it is beyond one.
async fn judge(request: reqwest::RequestBuilder, is_allowed: bool) -> Result<(), String> {
    let response = request.send().await.unwrap();
    let status = response.status().as_u16();
    if status >= 500 && status != 503 {
        return Err(format!("status {status}"));
    }
    // The body of an answer without an error may have no end.
    let problem: Option<Problem> = match status {
        400.. => response.json().await.ok(),
        _ => None,
    };
    let is_limit = |it: &Problem| {
        it.kind == ProblemKind::InvalidRequest
            && ["must be at ", "must have at ", "must not contain"]
                .iter()
                .any(|words| it.detail.contains(words))
    };
    let is_refused = problem.as_ref().is_some_and(is_limit);
    match is_refused == is_allowed {
        true => Err(format!(
            "allowed: {is_allowed}, answer: {status} {problem:?}"
        )),
        false => Ok(()),
    }
}

/// A value that a schema describes, as small as possible.
fn least(document: &Value, schema: &Value) -> Value {
    let schema = resolve(document, schema);
    if let Some(known) = schema["enum"].as_array() {
        return known[0].clone();
    }
    if let Some(choices) = schema["oneOf"].as_array() {
        let real = choices.iter().find(|it| it["type"] != "null").unwrap();
        return least(document, real);
    }
    match kind(schema).as_str() {
        "object" => {
            let required = schema["required"].as_array().into_iter().flatten();
            let fields = required.map(|name| {
                let name = name.as_str().unwrap();
                let value = least(document, &schema["properties"][name]);
                (name.to_owned(), value)
            });
            Value::Object(fields.collect())
        }
        "array" => {
            let count = schema["minItems"].as_u64().unwrap_or(0);
            let item = least(document, &schema["items"]);
            json!(vec![item; count as usize])
        }
        "integer" => schema["minimum"].as_i64().unwrap_or(0).into(),
        "boolean" => false.into(),
        _ => "x".repeat(length(schema, "minLength").unwrap_or(1)).into(),
    }
}

/// Values at each limit of a schema, and just beyond it.
fn variants(document: &Value, schema: &Value) -> Vec<Variant> {
    let schema = resolve(document, schema);
    if let Some(choices) = schema["oneOf"].as_array() {
        return choices
            .iter()
            .flat_map(|it| variants(document, it))
            .collect();
    }
    match kind(schema).as_str() {
        "object" => of_object(document, schema),
        "array" => of_array(document, schema),
        "integer" => {
            let mut all = Vec::new();
            if let Some(limit) = schema["minimum"].as_i64() {
                all.push(Variant::new("minimum", limit, true));
                // No unsigned number is below zero, which serde says in its own words.
                if limit > 0 {
                    all.push(Variant::new("minimum", limit - 1, false));
                }
            }
            if let Some(limit) = schema["maximum"].as_i64() {
                all.push(Variant::new("maximum", limit, true));
                all.push(Variant::new("maximum", limit + 1, false));
            }
            all
        }
        "string" => of_text(schema),
        _ => Vec::new(),
    }
}

fn of_text(schema: &Value) -> Vec<Variant> {
    let mut all = Vec::new();
    if let Some(limit) = length(schema, "minLength").filter(|limit| *limit > 0) {
        all.push(Variant::new("minLength", "x".repeat(limit - 1), false));
        all.push(Variant::new("minLength", "x".repeat(limit), true));
    }
    if let Some(limit) = length(schema, "maxLength") {
        all.push(Variant::new("maxLength", "x".repeat(limit), true));
        all.push(Variant::new("maxLength", "x".repeat(limit + 1), false));
        all.push(Variant::new(
            "maxLength of characters",
            "ä".repeat(limit),
            true,
        ));
        all.push(Variant::new("NUL", "x\0", false));
    }
    // Numbers that are written as texts are checked for what they are elsewhere.
    all
}

fn of_array(document: &Value, schema: &Value) -> Vec<Variant> {
    let item = least(document, &schema["items"]);
    let several = |count: usize| json!(vec![item.clone(); count]);
    let mut all = Vec::new();
    if let Some(limit) = length(schema, "minItems").filter(|limit| *limit > 0) {
        all.push(Variant::new("minItems", several(limit - 1), false));
        all.push(Variant::new("minItems", several(limit), true));
    }
    if let Some(limit) = length(schema, "maxItems") {
        all.push(Variant::new("maxItems", several(limit), true));
        all.push(Variant::new("maxItems", several(limit + 1), false));
    }
    let inner = variants(document, &schema["items"]).into_iter();
    all.extend(inner.map(|it| it.within("item", |item| json!([item]))));
    all
}

fn of_object(document: &Value, schema: &Value) -> Vec<Variant> {
    let Value::Object(base) = least(document, schema) else {
        panic!("{schema}");
    };
    let with = |name: &str, value: Value| {
        let mut whole = base.clone();
        whole.insert(name.to_owned(), value);
        Value::Object(whole)
    };
    let mut all = Vec::new();
    for (name, inner) in schema["properties"].as_object().into_iter().flatten() {
        let inner = variants(document, inner).into_iter();
        all.extend(inner.map(|it| it.within(name, |value| with(name, value))));
    }
    let value = least(document, &schema["additionalProperties"]);
    let several = |count: usize| -> Value {
        let keys = (0..count).map(|number| (format!("k{number}"), value.clone()));
        Value::Object(keys.collect::<Map<_, _>>())
    };
    if let Some(limit) = length(schema, "maxProperties") {
        all.push(Variant::new("maxProperties", several(limit), true));
        all.push(Variant::new("maxProperties", several(limit + 1), false));
    }
    for name in of_text(&schema["propertyNames"]) {
        let key = name.value.as_str().unwrap().to_owned();
        let value = value.clone();
        all.push(name.within("key", |_| json!({ key: value })));
    }
    if schema["additionalProperties"].is_object() {
        let inner = variants(document, &schema["additionalProperties"]).into_iter();
        all.extend(inner.map(|it| it.within("value", |value| json!({ "k": value }))));
    }
    all
}

fn resolve<'a>(document: &'a Value, schema: &'a Value) -> &'a Value {
    match schema["$ref"].as_str() {
        Some(target) => document.pointer(target.strip_prefix('#').unwrap()).unwrap(),
        None => schema,
    }
}

fn kind(schema: &Value) -> String {
    let kind = match &schema["type"] {
        Value::Array(kinds) => kinds.iter().find(|kind| *kind != "null").unwrap(),
        kind => kind,
    };
    kind.as_str().unwrap_or_default().to_owned()
}

fn length(schema: &Value, name: &str) -> Option<usize> {
    schema[name].as_u64().map(|limit| limit as usize)
}
