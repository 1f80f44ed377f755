//! The book holds together: its pages can be read by the test that runs them, and its links lead
//! somewhere. `guest_book` runs the commands.
#![allow(clippy::unwrap_used)]

mod book;

use std::collections::BTreeSet;
use std::path::Path;

use book::{How, beside, compare, links, pages, read, root};

/// How many blocks may say that no test can run them.
const MOST_SKIPPED: usize = 5;

#[test]
fn every_link_leads_to_a_file_and_every_anchor_to_a_heading() {
    let mut paths: Vec<_> = pages().into_iter().map(|page| page.path).collect();
    paths.push("docs/README.md".into());
    for path in paths {
        for (line, link) in links(&read(&path)) {
            let place = format!("{}:{line}: {link}", path.display());
            let (file, anchor) = link.split_once('#').unwrap_or((&link, ""));
            let target = match file {
                "" => path.clone(),
                file => beside(&path, file),
            };
            assert!(
                root().join(&target).exists(),
                "{place}: there is no such file"
            );
            if !anchor.is_empty() {
                let text = read(&target);
                let mut headings = text.lines().filter(|line| line.starts_with('#'));
                assert!(
                    headings.any(|heading| anchor_of(heading) == anchor),
                    "{place}: there is no such heading"
                );
            }
        }
    }
}

/// As code hosts make it.
fn anchor_of(heading: &str) -> String {
    let text = heading.trim_start_matches('#').trim().to_lowercase();
    let kept = text
        .chars()
        .filter(|c| c.is_alphanumeric() || " -_".contains(*c));
    kept.map(|c| if c == ' ' { '-' } else { c }).collect()
}

#[test]
fn pages_show_commands_of_which_few_cannot_be_run() {
    let pages = pages();
    assert_eq!(pages[0].path, Path::new("docs/quick-start.md"));
    assert_eq!(pages[1].path, Path::new("README.md"));
    assert!(pages.len() >= 12);
    let blocks: Vec<_> = pages.iter().flat_map(|page| &page.blocks).collect();
    let skipped = blocks.iter().filter(|block| block.is_skipped()).count();
    assert!(skipped <= MOST_SKIPPED, "{skipped} blocks are skipped");
    assert!(blocks.len() > 10 * skipped);
    assert!(blocks.iter().filter(|it| it.how == How::Serve).count() >= 2);
    // No page of the folder is forgotten.
    let index = read(Path::new("docs/README.md"));
    for folder in ["docs", "docs/guides"] {
        for entry in std::fs::read_dir(root().join(folder)).unwrap() {
            let name = entry.unwrap().file_name().into_string().unwrap();
            let is_page = name.ends_with(".md") && name != "README.md";
            assert!(!is_page || index.contains(&name), "{folder}/{name}");
        }
    }
}

#[test]
fn a_script_has_its_pages_line_numbers() {
    for page in pages() {
        let script = page.script();
        let lines: Vec<&str> = script.lines().collect();
        assert_eq!(lines.len(), page.lines.len());
        for block in page.blocks.iter().filter(|it| it.how == How::Run) {
            assert_eq!(lines[block.line - 1], format!("__begin {}", block.line));
            assert_eq!(lines[block.line + block.len], "__end");
        }
    }
}

#[test]
fn output_is_compared_but_for_what_is_left_open() {
    for (expected, got) in [
        ("a  b", "a b\n"),
        ("a\n\nb", "a\nb"),
        ("x … y", "x 1 2 y"),
        ("…", ""),
        ("a\n…\nz", "a\nb\nc\nz"),
        ("…\nz", "y\nz"),
    ] {
        assert_eq!(compare(expected, got), Ok(()), "{expected:?}");
    }
    for (expected, got, told) in [
        ("a", "b", "`a`"),
        ("a\nb", "a", "`b`"),
        ("a", "a\nb", "more"),
        ("x…y", "x1z", "`x…y`"),
        ("a\n…\nz", "a\nb", "`z`"),
        ("a…a", "a", "`a…a`"),
    ] {
        let wrong = compare(expected, got).unwrap_err();
        assert!(wrong.contains(told), "{expected:?}: {wrong}");
    }
}

/// The names in backquotes of a table's cell.
fn quoted(cell: &str) -> Vec<&str> {
    cell.split('`').skip(1).step_by(2).collect()
}

/// The claims of a page's tables whose last column is "test", each with the tests that hold it.
fn claims(page: &str) -> Vec<(&str, Vec<&str>)> {
    let mut in_claims = false;
    let mut claims = Vec::new();
    for line in page.lines() {
        let cells: Vec<&str> = line.trim_matches('|').split(" | ").map(str::trim).collect();
        match (line.starts_with('|'), cells.as_slice()) {
            (false, _) => in_claims = false,
            (true, [.., "test"]) => in_claims = true,
            (true, [rule, ..]) if rule.starts_with("---") => {}
            (true, [claim, .., tests]) if in_claims => claims.push((*claim, quoted(tests))),
            _ => {}
        }
    }
    claims
}

/// The names of all functions in the sources below `folder`.
fn collect_functions(folder: &Path, names: &mut BTreeSet<String>) {
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            collect_functions(&path, names);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            let text = std::fs::read_to_string(&path).unwrap();
            let functions = text.split("fn ").skip(1);
            names.extend(functions.filter_map(|rest| Some(rest.split_once('(')?.0.to_owned())));
        }
    }
}

#[test]
fn every_claim_of_the_security_page_names_tests_that_exist() {
    let page = read(Path::new("docs/security.md"));
    let claims = claims(&page);
    assert!(claims.len() >= 30, "{}", claims.len());
    let mut names = BTreeSet::new();
    for folder in ["crates", "xtask"] {
        collect_functions(&root().join(folder), &mut names);
    }
    for (claim, tests) in claims {
        assert!(!tests.is_empty(), "no test holds: {claim}");
        for test in tests {
            assert!(names.contains(test), "there is no test `{test}`: {claim}");
        }
    }
}
