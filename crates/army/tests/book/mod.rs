//! The pages of the book, as their Markdown has them: which commands are shown, and what they are
//! said to print.
//!
//! What is a command and what not, for whoever writes pages:
//!
//! - A fence ```` ```bash ```` is run, all of a page's in one shell, by root, with the programs of
//!   this build first in PATH, in a directory that has links to `target` and `examples`. Pages are
//!   run in the order of the links of `docs/README.md`, the README after the first of them. What
//!   the first page makes (the template `base`, a server of Army) is there for the others; VMs are
//!   not, and templates that a page makes it removes.
//! - A fence ```` ```text ```` or ```` ```json ```` right behind it is all that it prints, on both
//!   outputs. `…` stands for anything within a line, and a line of `…` alone for any lines. Spaces
//!   and empty lines are not compared.
//! - `<!-- book: skip: REASON -->` before a fence: it is not run; the test prints it with its
//!   reason.
//! - `<!-- book: serve -->`: it is one server's command, which is run beside the others, and is
//!   ready when it says so.
//! - `<!-- book: alone -->`: the page's host is another one, with none of the first page's servers
//!   and nothing in `/var/lib/army`.
//! - `ARMY_KEY=…` in a command gets the key that the last server printed first, and `--token …` the
//!   last line of the fence before. `systemctl stop|start|restart army-dev` does that to the server.
//! - Other code in a page is fenced as `text`, `json` or `toml`; indented code is an error, since
//!   nobody would run it.
#![allow(dead_code, unreachable_pub)]

use std::path::{Path, PathBuf};

/// A page that is run after the first one, and is none of the book's own.
const README: &str = "README.md";
const INDEX: &str = "docs/README.md";
/// Pages that the index names for whoever works on the code: their commands are the tree's chores.
const NOT_RUN: [&str; 4] = [
    "ARCHITECTURE.md",
    "CONTRIBUTING.md",
    "docs/testbed.md",
    "docs/benchmarks.md",
];

/// What a script does first: it tells where it is, and ends where a command fails.
const TRAPS: &str = "trap '__failed $? \"$LINENO\" \"$BASH_COMMAND\"' ERR; \
                     trap 'echo \"$LINENO\" > \"$__out/line\"' DEBUG";

/// A page.
pub struct Page {
    /// Below the repository's root.
    pub path: PathBuf,
    /// Its lines.
    pub lines: Vec<String>,
    /// The commands that it shows.
    pub blocks: Vec<Block>,
    /// Whether it is about another host.
    pub alone: bool,
}

/// Commands that are shown together.
pub struct Block {
    /// The number of the line with the opening fence, from 1.
    pub line: usize,
    /// How many lines are between the fences.
    pub len: usize,
    /// What is done with it.
    pub how: How,
    /// What it prints, and the line of that fence.
    pub expected: Option<(usize, String)>,
}

/// What is done with a block.
#[derive(Debug, PartialEq, Eq)]
pub enum How {
    /// It is run to its end.
    Run,
    /// It is started, and goes on.
    Serve,
    /// Neither, for this reason.
    Skip(String),
}

/// The repository's root.
pub fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..")
}

/// All pages, in the order in which they are run.
///
/// # Panics
/// Where a page breaks the rules above, with its line.
pub fn pages() -> Vec<Page> {
    let mut paths: Vec<PathBuf> = Vec::new();
    for (_, link) in links(&read(Path::new(INDEX))) {
        let page = beside(Path::new(INDEX), &link);
        let known = paths.contains(&page) || NOT_RUN.iter().any(|it| Path::new(it) == page);
        if !known && page != Path::new(README) {
            paths.push(page);
        }
    }
    paths.insert(1, README.into());
    paths.iter().map(|path| Page::read(path)).collect()
}

/// The text of a file of the repository.
pub fn read(path: &Path) -> String {
    std::fs::read_to_string(root().join(path))
        .unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// Where the links and pictures of a page lead within the repository, with their lines.
pub fn links(text: &str) -> Vec<(usize, String)> {
    let mut found = Vec::new();
    for (number, line) in numbered(text) {
        for piece in line.split("](").skip(1) {
            let target = piece.split(')').next().unwrap_or_default();
            if !target.contains("://") {
                found.push((number, target.to_owned()));
            }
        }
    }
    found
}

/// Where a link of `page` leads, below the repository's root, without its anchor.
pub fn beside(page: &Path, link: &str) -> PathBuf {
    let file = link.split('#').next().unwrap_or_default();
    let mut path = page.parent().unwrap_or(Path::new("")).to_owned();
    for part in Path::new(file).components() {
        match part {
            std::path::Component::ParentDir => {
                path.pop();
            }
            part => path.push(part),
        }
    }
    path
}

fn numbered(text: &str) -> impl Iterator<Item = (usize, &str)> {
    text.lines()
        .enumerate()
        .map(|(index, line)| (index + 1, line))
}

/// What a page is read with.
#[derive(Default)]
struct Reader {
    blocks: Vec<Block>,
    alone: bool,
    /// What was said of the next block.
    next: Option<How>,
    /// Whether nothing but empty lines came since the last block.
    just_ended: bool,
}

impl Page {
    fn read(path: &Path) -> Self {
        let text = read(path);
        let mut reader = Reader::default();
        let mut lines = numbered(&text);
        let mut empty = true;
        while let Some((number, line)) = lines.next() {
            if let Some(language) = line.strip_prefix("```") {
                let code: Vec<&str> = lines
                    .by_ref()
                    .map(|(_, line)| line)
                    .take_while(|line| *line != "```")
                    .collect();
                if let Err(wrong) = reader.code(number, language, &code) {
                    panic!("{}:{number}: {wrong}", path.display());
                }
            } else if let Some(word) = line.strip_prefix("<!-- book: ") {
                let word = word.trim_end_matches(" -->");
                if let Err(wrong) = reader.word(word) {
                    panic!("{}:{number}: {wrong}", path.display());
                }
            } else if !line.trim().is_empty() {
                let code = line.trim_start().starts_with("```") || line.starts_with("    ");
                if code && empty {
                    panic!("{}:{number}: fence this code at the margin", path.display());
                }
                reader.just_ended = false;
            }
            empty = line.trim().is_empty();
        }
        Self {
            path: path.to_owned(),
            lines: text.lines().map(str::to_owned).collect(),
            blocks: reader.blocks,
            alone: reader.alone,
        }
    }

    /// The page as a shell script, whose lines have the page's numbers.
    pub fn script(&self) -> String {
        let mut lines = vec![String::new(); self.lines.len()];
        // A page's first line is its title.
        lines[0] = TRAPS.to_owned();
        if self.alone {
            lines[0].push_str("; __alone");
        }
        for block in self.blocks.iter().filter(|it| !it.is_skipped()) {
            lines[block.line - 1] = format!("__begin {}", block.line);
            let body = block.line..block.line + block.len;
            for (slot, line) in lines[body.clone()].iter_mut().zip(&self.lines[body]) {
                let line = line.replace("ARMY_KEY=…", "ARMY_KEY=$(cat \"$__dir/key\")");
                let line = line.replace("--token …", "--token \"$(cat \"$__dir/last\")\"");
                *slot = match block.how {
                    How::Serve => format!("__serve {line}"),
                    _ => line,
                };
            }
            lines[block.line + block.len] = "__end".to_owned();
        }
        lines.join("\n") + "\n"
    }
}

impl Block {
    /// Whether it is not run.
    pub fn is_skipped(&self) -> bool {
        matches!(self.how, How::Skip(_))
    }
}

impl Reader {
    fn word(&mut self, word: &str) -> Result<(), String> {
        match word.split_once(": ").unwrap_or((word, "")) {
            ("skip", reason) if !reason.is_empty() => self.next = Some(How::Skip(reason.into())),
            ("serve", "") => self.next = Some(How::Serve),
            ("alone", "") if self.blocks.is_empty() => self.alone = true,
            _ => return Err(format!("`{word}` is nothing that can be said here")),
        }
        Ok(())
    }

    fn code(&mut self, line: usize, language: &str, code: &[&str]) -> Result<(), String> {
        let just_ended = std::mem::replace(&mut self.just_ended, false);
        let how = self.next.take();
        match language {
            "bash" => {
                let how = how.unwrap_or(How::Run);
                if how == How::Serve && code.len() != 1 {
                    return Err("a server is started by one line".into());
                }
                self.just_ended = how == How::Run || how == How::Serve;
                self.blocks.push(Block {
                    line,
                    len: code.len(),
                    how,
                    expected: None,
                });
                Ok(())
            }
            _ if how.is_some() => Err("what is said before is about commands".into()),
            "text" | "json" => {
                if let Some(block) = self.blocks.last_mut().filter(|_| just_ended) {
                    block.expected = Some((line, code.join("\n")));
                }
                Ok(())
            }
            "toml" => Ok(()),
            _ => Err(format!(
                "`{language}`: fence code as bash, text, json or toml"
            )),
        }
    }
}

/// Whether `got` is what `expected` says; if not, the first line where it is not.
pub fn compare(expected: &str, got: &str) -> Result<(), String> {
    let (expected, got) = (lines_of(expected), lines_of(got));
    if lines_match(&expected, &got) {
        return Ok(());
    }
    // The longest beginning that something printed could still go on to match.
    let good = (0..=expected.len())
        .rev()
        .find(|count| {
            let mut open = expected[..*count].to_vec();
            open.push("…".to_owned());
            lines_match(&open, &got)
        })
        .unwrap_or(0);
    Err(match expected.get(good) {
        Some(line) => format!("nothing that was printed is `{line}` here"),
        None => "more was printed".to_owned(),
    })
}

fn lines_of(text: &str) -> Vec<String> {
    text.lines()
        .map(|line| line.split_whitespace().collect::<Vec<_>>().join(" "))
        .filter(|line| !line.is_empty())
        .collect()
}

fn lines_match(expected: &[String], got: &[String]) -> bool {
    match expected.split_first() {
        None => got.is_empty(),
        Some((line, rest)) if line == "…" => {
            (0..=got.len()).any(|skipped| lines_match(rest, &got[skipped..]))
        }
        Some((line, rest)) => match got.split_first() {
            Some((first, others)) => line_matches(line, first) && lines_match(rest, others),
            None => false,
        },
    }
}

fn line_matches(expected: &str, got: &str) -> bool {
    let Some((start, rest)) = expected.split_once('…') else {
        return expected == got;
    };
    let Some(mut got) = got.strip_prefix(start) else {
        return false;
    };
    let mut pieces: Vec<&str> = rest.split('…').collect();
    let last = pieces.pop().unwrap_or_default();
    for piece in pieces {
        match got.find(piece) {
            Some(at) => got = &got[at + piece.len()..],
            None => return false,
        }
    }
    got.ends_with(last)
}
