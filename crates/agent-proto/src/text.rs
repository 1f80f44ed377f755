//! Makes text of a guest safe for a terminal, a log and an API.

/// The most characters of a text.
pub const MAX_TEXT: usize = 500;

/// The text in printable characters, at most [`MAX_TEXT`] of them.
///
/// Control characters, escape sequences, line breaks and characters that change the direction of
/// what follows are shown escaped, as in `\u{1b}`. Text that is cut off ends with `…`.
///
/// ```
/// use agent_proto::text::printable;
/// assert_eq!(printable("plain \"ä\" text"), "plain \"ä\" text");
/// assert_eq!(printable("\x1b[2Jgone\n"), "\\u{1b}[2Jgone\\n");
/// ```
pub fn printable(text: &str) -> String {
    let mut characters = text.chars().flat_map(shown);
    let mut printable: String = characters.by_ref().take(MAX_TEXT).collect();
    if characters.next().is_some() {
        printable.pop();
        printable.push('…');
    }
    printable
}

/// Escapes a character if it is not printable.
fn shown(character: char) -> impl Iterator<Item = char> {
    let plain = matches!(character, '"' | '\'' | '\\');
    let escaped = (!plain).then(|| character.escape_debug());
    plain
        .then_some(character)
        .into_iter()
        .chain(escaped.into_iter().flatten())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn what_a_terminal_would_act_on_is_shown_escaped() {
        for (text, shown) in [
            ("\u{1b}]0;title\u{7}", r"\u{1b}]0;title\u{7}"),
            ("\u{9b}31m", r"\u{9b}31m"),
            ("a\rb\tc\0", r"a\rb\tc\0"),
            ("\u{202e}txt", r"\u{202e}txt"),
            ("\u{2066}x\u{200b}", r"\u{2066}x\u{200b}"),
        ] {
            assert_eq!(printable(text), shown);
        }
    }

    proptest! {
        #[test]
        fn any_text_is_printable_and_short(text in any::<String>(), times in 1_usize..100) {
            let printable = printable(&text.repeat(times));
            prop_assert!(printable.chars().count() <= MAX_TEXT);
            prop_assert!(!printable.chars().any(char::is_control));
        }
    }

    #[test]
    fn a_long_text_is_cut_and_says_so() {
        assert_eq!(printable(&"x".repeat(MAX_TEXT)), "x".repeat(MAX_TEXT));
        let cut = printable(&"x".repeat(MAX_TEXT + 1));
        assert_eq!(cut.chars().count(), MAX_TEXT);
        assert!(cut.ends_with("x…"));
    }
}
