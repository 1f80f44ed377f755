//! The migrations of the database's schema: steps that are applied in order, each once.
//!
//! A step that was released is never edited, because the database holds its checksum. The files are
//! named here one by one: with the macro that finds them, every build would compile the drivers of
//! both databases a second time, for the compiler.

use std::borrow::Cow;

use sqlx::SqlStr;
use sqlx::migrate::{Migration, MigrationType, Migrator};

/// The name and the SQL of each step. The version of a step is its place, counted from one.
const STEPS: [(&str, &str); 14] = [
    ("start", include_str!("../../migrations/0001_start.sql")),
    (
        "several hosts",
        include_str!("../../migrations/0002_several_hosts.sql"),
    ),
    ("tags", include_str!("../../migrations/0003_tags.sql")),
    ("network", include_str!("../../migrations/0004_network.sql")),
    ("notices", include_str!("../../migrations/0005_notices.sql")),
    (
        "controllers",
        include_str!("../../migrations/0006_controllers.sql"),
    ),
    (
        "operations",
        include_str!("../../migrations/0007_operations.sql"),
    ),
    ("actor", include_str!("../../migrations/0008_actor.sql")),
    ("join", include_str!("../../migrations/0009_join.sql")),
    ("changes", include_str!("../../migrations/0010_changes.sql")),
    ("keys", include_str!("../../migrations/0011_keys.sql")),
    (
        "webhooks",
        include_str!("../../migrations/0012_webhooks.sql"),
    ),
    ("tenancy", include_str!("../../migrations/0013_tenancy.sql")),
    ("moves", include_str!("../../migrations/0014_moves.sql")),
];

/// All steps.
pub(super) fn all() -> Migrator {
    let steps = (1..).zip(STEPS).map(|(version, (name, sql))| {
        let (name, sql) = (Cow::Borrowed(name), SqlStr::from_static(sql));
        Migration::new(version, name, MigrationType::Simple, sql, false)
    });
    Migrator::with_migrations(steps.collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_file_is_a_step_and_at_its_place() {
        let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/migrations");
        let entries = std::fs::read_dir(folder).unwrap();
        let mut files: Vec<String> = entries
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        files.sort();
        let steps = all();
        let named = steps.iter().map(|step| {
            let name = step.description.replace(' ', "_");
            format!("{:04}_{name}.sql", step.version)
        });
        let named: Vec<String> = named.collect();
        assert_eq!(named, files);
    }
}
