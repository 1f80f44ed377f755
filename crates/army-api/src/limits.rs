//! The schemas of maps whose sizes are limited. The server enforces what the schemas say.

use utoipa::openapi::schema::{Object, ObjectBuilder, Schema, SchemaType, Type};

/// The labels of a VM, or those that a host must have.
pub(crate) fn labels() -> Object {
    map(64, 63, text(255, false))
}

/// Labels to set, or to remove where the value is null.
pub(crate) fn label_changes() -> Object {
    map(64, 63, text(255, true))
}

/// Environment variables.
pub(crate) fn environment() -> Object {
    map(256, 255, text(32768, false))
}

fn text(most: usize, nullable: bool) -> Object {
    let kind = match nullable {
        true => SchemaType::from_iter([Type::String, Type::Null]),
        false => SchemaType::new(Type::String),
    };
    let text = ObjectBuilder::new().schema_type(kind);
    text.max_length(Some(most)).build()
}

fn map(entries: usize, key: usize, value: Object) -> Object {
    let keys = ObjectBuilder::new().schema_type(SchemaType::new(Type::String));
    let keys = keys.min_length(Some(1)).max_length(Some(key)).build();
    ObjectBuilder::new()
        .schema_type(SchemaType::new(Type::Object))
        .max_properties(Some(entries))
        .property_names(Some(keys))
        .additional_properties(Some(Schema::Object(value)))
        .build()
}
