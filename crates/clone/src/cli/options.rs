//! Parses options of the form `FIRST,key=value,flag`, as `--disk` and `--net` take them.
//!
//! A comma ends an option, and a doubled comma stands for a comma, as in QEMU. So a value may
//! contain any character, and any byte of a file name. Only the first `=` of an option divides it.

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::PathBuf;

/// One option: the key before its first `=`, and the value after it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct KeyValue {
    pub(super) key: String,
    /// The value; `None` without a `=`.
    pub(super) value: Option<OsString>,
}

impl KeyValue {
    fn of(option: Vec<u8>) -> Self {
        let (key, value) = match option.iter().position(|&byte| byte == b'=') {
            Some(at) => (
                &option[..at],
                Some(OsString::from_vec(option[at + 1..].to_vec())),
            ),
            None => (&option[..], None),
        };
        Self {
            key: String::from_utf8_lossy(key).into_owned(),
            value,
        }
    }

    /// The value as text; empty if there is none.
    pub(super) fn text(&self) -> Result<&str, String> {
        match &self.value {
            None => Ok(""),
            Some(value) => value
                .to_str()
                .ok_or_else(|| format!("the value of {} is not UTF-8: {value:?}", self.key)),
        }
    }

    /// The value as a path, which must not be empty.
    pub(super) fn path(&self) -> Result<PathBuf, String> {
        match &self.value {
            Some(value) if !value.is_empty() => Ok(value.into()),
            _ => Err(format!("{} needs a file: {}=FILE", self.key, self.key)),
        }
    }
}

impl std::fmt::Display for KeyValue {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.key)?;
        match &self.value {
            Some(value) => write!(f, "={}", value.display()),
            None => Ok(()),
        }
    }
}

/// Splits at single commas.
fn split(text: &OsStr) -> Vec<Vec<u8>> {
    let mut parts = vec![Vec::new()];
    let mut bytes = text.as_bytes().iter().copied().peekable();
    while let Some(byte) = bytes.next() {
        if byte == b',' && bytes.next_if_eq(&b',').is_none() {
            parts.push(Vec::new());
        } else if let Some(part) = parts.last_mut() {
            part.push(byte);
        }
    }
    parts
}

/// Splits the text into options; empty ones are skipped.
pub(super) fn options(text: &OsStr) -> Vec<KeyValue> {
    let parts = split(text).into_iter();
    parts
        .filter(|part| !part.is_empty())
        .map(KeyValue::of)
        .collect()
}

/// A first value without a key, and the options after it.
pub(super) fn first_and_options(text: &OsStr) -> (OsString, Vec<KeyValue>) {
    let mut parts = split(text).into_iter();
    let first = OsString::from_vec(parts.next().unwrap_or_default());
    let rest = parts.filter(|part| !part.is_empty()).map(KeyValue::of);
    (first, rest.collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> (String, Vec<(String, String)>) {
        let (first, rest) = first_and_options(OsStr::new(text));
        let pair = |it: &KeyValue| (it.key.clone(), it.text().unwrap().to_owned());
        (
            first.into_string().unwrap(),
            rest.iter().map(pair).collect(),
        )
    }

    #[test]
    fn a_doubled_comma_stands_for_itself() {
        let pair = |key: &str, value: &str| (key.to_owned(), value.to_owned());
        assert_eq!(
            parse("/a,,b=c d,ro,overlay=/x,,,,y=z"),
            (
                "/a,b=c d".into(),
                vec![pair("ro", ""), pair("overlay", "/x,,y=z")]
            )
        );
        // Three are one of the value, and then an end.
        assert_eq!(parse("a,,,ro"), ("a,".into(), vec![pair("ro", "")]));
        assert_eq!(parse(""), (String::new(), vec![]));
        assert_eq!(parse("a,"), ("a".into(), vec![]));
    }

    #[test]
    fn any_path_survives_being_escaped() {
        for name in [
            &b"/plain"[..],
            b",",
            b",,a,",
            b"=,=",
            b"/n\xff,\xfe\n -x",
            b"-o,ro",
        ] {
            let escaped: Vec<u8> = name
                .iter()
                .flat_map(|&byte| vec![byte; if byte == b',' { 2 } else { 1 }])
                .collect();
            let text = [&b"overlay="[..], &escaped, b",ro"].concat();
            let found = options(OsStr::from_bytes(&text));
            assert_eq!(found[0].path().unwrap().as_os_str().as_bytes(), name);
            assert_eq!(found[1].key, "ro");
        }
    }
}
