//! The book holds together: its pages can be read by the test that runs them, and its links lead
//! somewhere. `guest_book` runs the commands.
#![allow(clippy::unwrap_used)]

mod book;

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
