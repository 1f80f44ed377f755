//! The limits of requests. The OpenAPI document says how large a number, how long a text and how
//! many elements each request may have, and this module enforces what it says: a limit is declared
//! once, at the field that it is about.
//!
//! Types are checked by serde, whose messages say more. So a value of another type than the schema's
//! only rules out an alternative of a `oneOf` here.

use std::sync::Arc;

use army_api::{Problem, ProblemKind};
use axum::extract::MatchedPath;
use axum::http::Method;
use axum::http::request::Parts;
use serde_json::Value;
use utoipa::openapi::OpenApi;

/// The limits of all operations.
#[derive(Clone)]
pub(super) struct Bounds(Arc<Value>);

/// Why a value does not match a schema.
enum Mismatch {
    /// The value is of another type, or of another alternative.
    Type,
    /// The value exceeds a limit, as a sentence says.
    Limit(String),
}

type Checked = Result<(), Mismatch>;

impl Bounds {
    /// The limits that a document describes.
    pub(super) fn of(document: &OpenApi) -> Self {
        Self(Arc::new(
            serde_json::to_value(document).unwrap_or(Value::Null),
        ))
    }

    /// Checks the JSON body of a request.
    pub(super) fn check_body(&self, parts: &Parts, body: &Value) -> Result<(), Problem> {
        let operation = self.operation(parts);
        let schema = &operation["requestBody"]["content"]["application/json"]["schema"];
        problem(self.check(schema, body, ""))
    }

    /// Checks the parameters of a request that are `location`: in its `path` or `query`.
    pub(super) fn check_parameters<'a>(
        &self,
        parts: &Parts,
        location: &str,
        values: impl Iterator<Item = (&'a str, &'a str)>,
    ) -> Result<(), Problem> {
        let operation = self.operation(parts);
        let described = operation["parameters"].as_array();
        for (name, text) in values {
            if text.contains('\0') {
                return problem(Err(nul(name)));
            }
            let is_it = |it: &&Value| it["in"] == location && it["name"] == name;
            let Some(parameter) = described.into_iter().flatten().find(is_it) else {
                continue;
            };
            let schema = &parameter["schema"];
            let value = match is_of_type(schema, "integer") {
                // A value that is not a number was refused before.
                true => serde_json::from_str(text).unwrap_or(Value::Null),
                false => Value::from(text),
            };
            problem(self.check(schema, &value, name))?;
        }
        Ok(())
    }

    fn operation(&self, parts: &Parts) -> &Value {
        let path = parts.extensions.get::<MatchedPath>();
        let method = match parts.method {
            Method::HEAD => "get".to_owned(),
            ref method => method.as_str().to_lowercase(),
        };
        &self.0["paths"][path.map_or("", MatchedPath::as_str)][method]
    }

    fn check(&self, schema: &Value, value: &Value, place: &str) -> Checked {
        if let Some(target) = schema["$ref"].as_str() {
            let target = target.strip_prefix('#').and_then(|it| self.0.pointer(it));
            return target.map_or(Ok(()), |schema| self.check(schema, value, place));
        }
        if let Some(choices) = schema["oneOf"].as_array() {
            return self.check_choices(choices, value, place);
        }
        let types = types(schema);
        if !types.is_empty() && !types.iter().any(|it| has_type(value, it)) {
            return Err(Mismatch::Type);
        }
        if let Some(known) = schema["enum"].as_array()
            && !known.contains(value)
        {
            return Err(Mismatch::Type);
        }
        match value {
            Value::Number(number) => check_number(schema, number, place),
            Value::String(text) => check_text(schema, text, place),
            Value::Array(items) => {
                check_count(schema, ["minItems", "maxItems"], items.len(), place)?;
                let check = |item| self.check(&schema["items"], item, place);
                items.iter().try_for_each(check)
            }
            Value::Object(fields) => {
                let limits = ["minProperties", "maxProperties"];
                check_count(schema, limits, fields.len(), place)?;
                self.check_fields(schema, fields, place)
            }
            Value::Null | Value::Bool(_) => Ok(()),
        }
    }

    fn check_choices(&self, choices: &[Value], value: &Value, place: &str) -> Checked {
        let mut mismatch = Mismatch::Type;
        for choice in choices {
            match self.check(choice, value, place) {
                Ok(()) => return Ok(()),
                Err(Mismatch::Type) => {}
                Err(limit) => mismatch = limit,
            }
        }
        Err(mismatch)
    }

    fn check_fields(
        &self,
        schema: &Value,
        fields: &serde_json::Map<String, Value>,
        place: &str,
    ) -> Checked {
        let required = schema["required"].as_array().into_iter().flatten();
        let mut required = required.filter_map(Value::as_str);
        if required.any(|name| !fields.contains_key(name)) {
            return Err(Mismatch::Type);
        }
        for (name, value) in fields {
            let inner = match place {
                "" => name.clone(),
                place => format!("{place}.{name}"),
            };
            match &schema["properties"][name] {
                Value::Null => {
                    let key = Value::from(name.as_str());
                    self.check(&schema["propertyNames"], &key, &format!("{place}: a key"))?;
                    self.check(&schema["additionalProperties"], value, &inner)?;
                }
                known => self.check(known, value, &inner)?,
            }
        }
        Ok(())
    }
}

fn problem(checked: Checked) -> Result<(), Problem> {
    match checked {
        // A type that is wrong was refused before, or is permitted by serde.
        Ok(()) | Err(Mismatch::Type) => Ok(()),
        Err(Mismatch::Limit(detail)) => Err(Problem::new(ProblemKind::InvalidRequest, detail)),
    }
}

fn types(schema: &Value) -> Vec<&str> {
    match &schema["type"] {
        Value::String(only) => vec![only],
        Value::Array(several) => several.iter().filter_map(Value::as_str).collect(),
        _ => Vec::new(),
    }
}

fn is_of_type(schema: &Value, wanted: &str) -> bool {
    types(schema).contains(&wanted)
}

fn has_type(value: &Value, name: &str) -> bool {
    match value {
        Value::Null => name == "null",
        Value::Bool(_) => name == "boolean",
        Value::Number(_) => matches!(name, "integer" | "number"),
        Value::String(_) => name == "string",
        Value::Array(_) => name == "array",
        Value::Object(_) => name == "object",
    }
}

fn check_number(schema: &Value, number: &serde_json::Number, place: &str) -> Checked {
    let whole = |number: &serde_json::Number| number.as_i128();
    let limit = |name: &str| schema[name].as_number().and_then(whole);
    let Some(value) = whole(number) else {
        return Ok(());
    };
    if let Some(least) = limit("minimum").filter(|least| value < *least) {
        return exceeded(format!("`{place}` must be at least {least}, not {value}"));
    }
    if let Some(most) = limit("maximum").filter(|most| value > *most) {
        return exceeded(format!("`{place}` must be at most {most}, not {value}"));
    }
    Ok(())
}

/// A text with a limit is a name or a label, and may not contain a NUL, which PostgreSQL refuses.
fn check_text(schema: &Value, text: &str, place: &str) -> Checked {
    if !schema["maxLength"].is_null() && text.contains('\0') {
        return Err(nul(place));
    }
    let len = text.chars().count();
    match exceeds(schema, ["minLength", "maxLength"], len) {
        None => Ok(()),
        Some(limit) => exceeded(format!("`{place}` must have {limit} characters, not {len}")),
    }
}

fn check_count(schema: &Value, limits: [&str; 2], count: usize, place: &str) -> Checked {
    match exceeds(schema, limits, count) {
        None => Ok(()),
        Some(limit) => exceeded(format!("`{place}` must have {limit} elements, not {count}")),
    }
}

/// The limit that a size exceeds, in words.
fn exceeds(schema: &Value, [least, most]: [&str; 2], len: usize) -> Option<String> {
    let limit = |name: &str| schema[name].as_u64();
    let len = len as u64;
    if let Some(least) = limit(least).filter(|least| len < *least) {
        return Some(format!("at least {least}"));
    }
    let most = limit(most).filter(|most| len > *most)?;
    Some(format!("at most {most}"))
}

fn exceeded(detail: String) -> Checked {
    Err(Mismatch::Limit(detail))
}

fn nul(place: &str) -> Mismatch {
    Mismatch::Limit(format!("`{place}` must not contain a NUL"))
}
