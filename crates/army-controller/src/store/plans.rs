//! Tests that every statement of the store finds its rows by an index, on either database. The
//! statements are taken out of the sources of this folder, so that a new one is examined, too.

mod postgres;

use std::collections::BTreeSet;

use sqlx::{AssertSqlSafe, Row};

use super::Store;
use super::vm_pages::{Conditions, page_query};

/// The tables that grow with what was ever done.
const LARGE: [&str; 3] = ["vms", "events", "operations"];
/// Indices that have few rows of a large table, and may be read from end to end: those of all VMs that
/// have not ended, and those of all operations in progress.
const SMALL: [&str; 5] = [
    "vms_of_hosts",
    "vms_of_templates",
    "vms_of_all_tenants",
    "operations_running",
    "operations_reserves",
];
/// The macros that statements are made with.
const MACROS: [(&str, &str); 2] = [
    (
        "next_change!()",
        "(SELECT COALESCE(MAX(changed), 0) + 1 FROM vms)",
    ),
    (
        "unowned!()",
        "address IS NOT NULL AND (owner IS NULL OR owner NOT IN (SELECT id FROM controllers))",
    ),
];

/// The text of a string literal that begins at the first quote of `source`, and what follows it.
fn literal(source: &str) -> Option<(String, &str)> {
    let mut text = String::new();
    let mut rest = source.get(1..)?;
    loop {
        let mut characters = rest.chars();
        match characters.next()? {
            '"' => return Some((text, characters.as_str())),
            '\\' => {
                let escaped = characters.next()?;
                rest = characters.as_str();
                match escaped {
                    '\n' => rest = rest.trim_start(),
                    'n' => text.push('\n'),
                    other => text.push(other),
                }
                continue;
            }
            other => text.push(other),
        }
        rest = characters.as_str();
    }
}

/// The text of a `concat!` that begins with `text`, and what follows it.
fn join(mut text: String, mut after: &str) -> (String, &str) {
    loop {
        let next = after.trim_start_matches([',', ' ', '\n']);
        if let Some((name, value)) = MACROS.iter().find(|(name, _)| next.starts_with(name)) {
            text.push_str(value);
            after = &next[name.len()..];
        } else if next.starts_with('"')
            && let Some((more, behind)) = literal(next)
        {
            text.push_str(&more);
            after = behind;
        } else {
            return (text, after);
        }
    }
}

/// The statements in a source file.
fn statements(source: &str) -> BTreeSet<String> {
    let source = source.split("#[cfg(test)]\nmod tests").next().unwrap();
    let code = source
        .lines()
        .filter(|line| !line.trim_start().starts_with("//"));
    let code = code.collect::<Vec<_>>().join("\n");
    let mut found = BTreeSet::new();
    let mut rest = code.as_str();
    while let Some(at) = rest.find('"') {
        let joined = rest[..at].trim_end().ends_with("concat!(");
        let Some((mut text, mut after)) = literal(&rest[at..]) else {
            break;
        };
        if joined {
            (text, after) = join(text, after);
        }
        rest = after;
        let verbs = ["SELECT ", "INSERT ", "UPDATE ", "DELETE ", "WITH "];
        if verbs.iter().any(|verb| text.starts_with(verb)) {
            // The lists that events are selected by.
            let text = text.replace("{own}", "'a', 'b'");
            found.insert(text.replace("{everybodys}", "'c', 'd'"));
        }
    }
    found
}

/// All statements of the store for a kind of database.
fn all_statements(is_postgres: bool) -> BTreeSet<String> {
    let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/src/store");
    let mut all = BTreeSet::new();
    for file in std::fs::read_dir(folder).unwrap() {
        let path = file.unwrap().path();
        let name = path.file_name().unwrap().to_str().unwrap();
        let others = ["filling.rs", "plans.rs", "upgrade_tests.rs", "vm_pages.rs"];
        if path.is_file() && !others.contains(&name) {
            all.extend(statements(&std::fs::read_to_string(&path).unwrap()));
        }
    }
    for bits in 0..128 {
        let conditions = Conditions {
            all: bits & 1 != 0,
            tenant: bits & 2 != 0,
            template: bits & 4 != 0,
            host: bits & 8 != 0,
            states: bits & 16 != 0,
            labels: bits >> 5 & 3,
        };
        all.insert(page_query(is_postgres, &conditions));
    }
    // What the other kind of database alone is asked.
    let of_others: &[&str] = match is_postgres {
        true => &["json_group_"],
        false => &["clock_timestamp", "json_agg", "json_object_agg"],
    };
    all.retain(|statement| !of_others.iter().any(|it| statement.contains(it)));
    all
}

#[tokio::test]
async fn every_statement_finds_its_rows_by_an_index_of_sqlite() {
    let dir = tempfile::tempdir().unwrap();
    let url = crate::Database::sqlite_url(&dir.path().join("army.db"));
    let store = Store::open(&url).await.unwrap();
    let statements = all_statements(false);
    assert!(statements.len() > 80, "{} were found", statements.len());
    let mut slow = Vec::new();
    for statement in &statements {
        let explain = AssertSqlSafe(format!("EXPLAIN QUERY PLAN {statement}"));
        let plan = sqlx::query(explain).fetch_all(&store.pool).await;
        let plan = plan.unwrap_or_else(|error| panic!("{statement}: {error}"));
        for step in plan {
            let step: String = step.try_get("detail").unwrap();
            let Some(scan) = step.strip_prefix("SCAN ") else {
                continue;
            };
            let (table, way) = scan.split_once(' ').unwrap_or((scan, ""));
            let index = way.rsplit(' ').next().unwrap_or_default();
            if LARGE.contains(&table) && !SMALL.contains(&index) {
                slow.push(format!("{step}: {statement}"));
            }
        }
    }
    assert_eq!(slow, [""; 0]);
}

#[test]
fn every_change_of_a_vm_has_a_number() {
    let changes = |statement: &&String| {
        statement.starts_with("UPDATE vms SET") || statement.starts_with("INSERT INTO vms")
    };
    let statements = all_statements(false);
    let changes: Vec<_> = statements.iter().filter(changes).collect();
    assert!(changes.len() >= 5, "{changes:?}");
    // Nobody needs to read on for these.
    let silent = [
        "UPDATE vms SET memory = ",
        "UPDATE vms SET state = 'unheard of'",
    ];
    for statement in changes {
        let is_silent = silent.iter().any(|it| statement.starts_with(it));
        assert!(is_silent || statement.contains("changed"), "{statement}");
    }
}
