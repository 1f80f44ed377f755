//! `/etc/hosts`, by which a guest resolves its own name, with or without a name server.

/// hosts(5).
pub(crate) const FILE: &str = "/etc/hosts";
/// The content of a new file.
pub(crate) const LOOPBACK: &str = "127.0.0.1 localhost\n::1 localhost ip6-localhost ip6-loopback\n";
/// The address that Debian gives a machine without one of its own, under its own name.
const OWN_ADDRESS: &str = "127.0.1.1";

/// `text` with `name` in the place of `former`; `None` where nothing has to change. What else is in
/// the file stays as it is.
pub(crate) fn renamed(text: &str, former: &str, name: &str) -> Option<String> {
    let mut found = false;
    let mut lines = Vec::new();
    for line in text.lines() {
        match own_names(line) {
            Some(names) => {
                found = true;
                lines.push(own_line(names, former, name));
            }
            None => {
                found |= line_names(line, name);
                lines.push(line.to_owned());
            }
        }
    }
    if !found {
        lines.push(format!("{OWN_ADDRESS} {name}"));
    }
    let renamed = lines.join("\n") + "\n";
    (renamed != text).then_some(renamed)
}

/// The names of the guest's own line; `None` for other lines.
fn own_names(line: &str) -> Option<&str> {
    let rest = line.trim_start().strip_prefix(OWN_ADDRESS)?;
    rest.starts_with(char::is_whitespace).then_some(rest)
}

fn own_line(names: &str, former: &str, name: &str) -> String {
    let (names, comment) = match names.split_once('#') {
        Some((names, comment)) => (names, format!(" #{comment}")),
        None => (names, String::new()),
    };
    let mut words: Vec<String> = names
        .split_whitespace()
        .map(|word| rename(word, former, name))
        .collect();
    if !words.iter().any(|word| word == name) {
        words.insert(0, name.to_owned());
    }
    format!("{OWN_ADDRESS} {}{comment}", words.join(" "))
}

/// A name that is `former`, or begins with it and a dot, becomes one of `name`.
fn rename(word: &str, former: &str, name: &str) -> String {
    match word.strip_prefix(former) {
        Some(rest) if !former.is_empty() && (rest.is_empty() || rest.starts_with('.')) => {
            format!("{name}{rest}")
        }
        _ => word.to_owned(),
    }
}

/// Whether a line gives `name` an address.
fn line_names(line: &str, name: &str) -> bool {
    let line = line.split('#').next().unwrap_or_default();
    line.split_whitespace().skip(1).any(|word| word == name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_clone_s_name_takes_the_place_of_its_template_s() {
        let text = "127.0.0.1 localhost\n127.0.1.1 base.example.org base other # us\n10.0.0.1 db\n";
        let clone = renamed(text, "base", "c1").unwrap();
        let expected = "127.0.0.1 localhost\n127.0.1.1 c1.example.org c1 other # us\n10.0.0.1 db\n";
        assert_eq!(clone, expected);
        assert_eq!(renamed(&clone, "c1", "c1"), None);
    }

    #[test]
    fn a_name_that_nobody_knows_is_added_and_one_that_is_known_is_left() {
        assert_eq!(
            renamed("127.0.0.1 localhost", "", "a").unwrap(),
            "127.0.0.1 localhost\n127.0.1.1 a\n"
        );
        assert_eq!(renamed("10.0.0.7 a\n", "b", "a"), None);
        let commented = renamed("# 10.0.0.7 a\n", "b", "a").unwrap();
        assert_eq!(commented, "# 10.0.0.7 a\n127.0.1.1 a\n");
        // Names that only begin alike, and addresses that only begin alike, are somebody else's.
        let text = "127.0.1.10 base\n127.0.1.1 basement\n";
        let expected = "127.0.1.10 base\n127.0.1.1 c basement\n";
        assert_eq!(renamed(text, "base", "c").unwrap(), expected);
    }

    #[test]
    fn a_file_of_ours_knows_the_loopback_too() {
        let text = renamed(LOOPBACK, "", "a").unwrap();
        assert!(text.starts_with(LOOPBACK) && text.ends_with("127.0.1.1 a\n"));
    }
}
