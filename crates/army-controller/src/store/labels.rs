//! Labels in lists. They are stored as JSON, for which SQLite and PostgreSQL have no functions in
//! common. So the database finds VMs by the text of a label, and what it finds is checked here.

use army_api::vms::Vm;

use crate::{Error, ErrorKind, Result};

/// The labels that VMs of a list must have.
pub(super) struct LabelFilter<'a>(Vec<(&'a str, Option<&'a str>)>);

impl<'a> LabelFilter<'a> {
    /// The labels of a request, written as `key=value` or as `key`.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidRequest`] where a label has no key.
    pub(super) fn of(labels: &'a [String]) -> Result<Self> {
        let parts = labels.iter().map(|label| match label.split_once('=') {
            Some((key, value)) => (key, Some(value)),
            None => (label.as_str(), None),
        });
        let parts: Vec<_> = parts.collect();
        if parts.iter().any(|(key, _)| key.is_empty()) {
            let message = "a label must be written as key=value, or as key";
            return Err(Error::new(ErrorKind::InvalidRequest, message));
        }
        Ok(Self(parts))
    }

    /// Whether a VM has all of the labels.
    pub(super) fn matches(&self, vm: &Vm) -> bool {
        self.0.iter().all(|(key, value)| {
            let has = vm.labels.get(*key);
            has.is_some_and(|has| value.is_none_or(|value| has == value))
        })
    }

    /// A pattern that the JSON of all VMs with the label at `index` matches, and hardly that of
    /// others; empty where there is no such label.
    pub(super) fn pattern(&self, index: usize) -> String {
        let Some((key, value)) = self.0.get(index) else {
            return String::new();
        };
        let json = |text: &str| serde_json::Value::from(text).to_string();
        let part = format!("{}:{}", json(key), value.map(json).unwrap_or_default());
        let mut pattern = String::from("%");
        for character in part.chars() {
            if "%_!".contains(character) {
                pattern.push('!');
            }
            pattern.push(character);
        }
        pattern + "%"
    }
}
