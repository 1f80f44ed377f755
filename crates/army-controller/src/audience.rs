//! Who gets to know of which events. A kind that is not listed here is for administrators only.

/// Those who get to know of an event.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Audience {
    /// The event's tenant.
    Tenant,
    /// The event's tenant, or all tenants where it has none.
    TenantOrEverybody,
    /// Administrators.
    Administrators,
}

use Audience::{Administrators, Tenant, TenantOrEverybody};

/// The audience of each kind. Administrators get to know of all of them.
const KINDS: &[(&str, Audience)] = &[
    ("vm.creating", Tenant),
    ("vm.running", Tenant),
    ("vm.paused", Tenant),
    ("vm.suspended", Tenant),
    ("vm.ended", Tenant),
    ("vm.failed", Tenant),
    ("vm.unreachable", Tenant),
    ("vm.moved", Tenant),
    ("vm.migrating", Tenant),
    ("vm.stayed", Tenant),
    ("vm.changed", Tenant),
    ("vm.checkpointed", Tenant),
    ("vm.rewound", Tenant),
    ("template.registered", TenantOrEverybody),
    ("template.copied", Administrators),
    ("template.tagged", TenantOrEverybody),
    ("template.untagged", TenantOrEverybody),
    ("template.shared", TenantOrEverybody),
    ("template.removed", TenantOrEverybody),
    ("key.created", Administrators),
    ("key.removed", Administrators),
    ("tenant.changed", Administrators),
    ("webhook.created", Administrators),
    ("webhook.removed", Administrators),
    ("webhook.disabled", Administrators),
    ("operation.started", Tenant),
    ("operation.succeeded", Tenant),
    ("operation.failed", Tenant),
    ("host.joined", Administrators),
    ("host.removed", Administrators),
    ("host.draining", Administrators),
    ("host.ready", Administrators),
    ("host.unreachable", Administrators),
    ("host.back", Administrators),
    ("host.moved", Administrators),
];

/// The audience of a kind of event; `None` where nobody has decided about it.
pub(crate) fn decided(kind: &str) -> Option<Audience> {
    let found = KINDS.iter().find(|(known, _)| *known == kind);
    found.map(|(_, audience)| *audience)
}

/// The kinds with an audience, as a list of SQL literals.
pub(crate) fn sql_list(audience: Audience) -> String {
    let kinds = KINDS.iter().filter(|(_, it)| *it == audience);
    let quoted: Vec<String> = kinds.map(|(kind, _)| format!("'{kind}'")).collect();
    quoted.join(", ")
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    /// The texts in quotes that look like kinds of events: `word.word`.
    fn kinds_in(source: &str) -> impl Iterator<Item = &str> {
        source.split('"').filter(|text| {
            let is_word =
                |word: &str| !word.is_empty() && word.bytes().all(|it| it.is_ascii_lowercase());
            let prefixes = [
                "vm",
                "template",
                "key",
                "host",
                "operation",
                "tenant",
                "webhook",
            ];
            text.split_once('.')
                .is_some_and(|(left, right)| prefixes.contains(&left) && is_word(right))
        })
    }

    fn check(folder: &Path, seen: &mut usize) {
        for entry in std::fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                check(&path, seen);
            } else if path.extension().is_some_and(|it| it == "rs")
                && !path.ends_with("audience.rs")
                && !path.ends_with("tests.rs")
            {
                let source = std::fs::read_to_string(&path).unwrap();
                for kind in kinds_in(&source) {
                    assert!(decided(kind).is_some(), "{kind} in {}", path.display());
                    *seen += 1;
                }
            }
        }
    }

    #[test]
    fn every_kind_of_event_in_this_crate_has_an_audience() {
        let mut seen = 0;
        let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
        check(&source, &mut seen);
        assert!(seen >= 15, "the search finds too little: {seen}");
        for state in [
            "creating",
            "running",
            "paused",
            "ended",
            "failed",
            "unreachable",
        ] {
            assert_eq!(decided(&format!("vm.{state}")), Some(Tenant));
        }
        assert_eq!(decided("vm.exploded"), None);
    }
}
