//! The token with which a host joins a cluster.

use std::fmt;
use std::str::FromStr;

/// The beginning of every token, by which a token that has leaked is recognized.
const PREFIX: &str = "army-join";
/// The right to join, once.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Token {
    /// The secret, whose hash the controller stores.
    pub secret: String,
    /// The fingerprint of the cluster's authority, by which the host recognizes the controller.
    pub fingerprint: String,
}

impl fmt::Display for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{PREFIX}.{}.{}", self.secret, self.fingerprint)
    }
}

impl FromStr for Token {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<Self, String> {
        let parts: Vec<&str> = text.trim().split('.').collect();
        match parts[..] {
            [PREFIX, secret, fingerprint] if !secret.is_empty() && fingerprint.len() == 64 => {
                Ok(Self {
                    secret: secret.to_owned(),
                    fingerprint: fingerprint.to_owned(),
                })
            }
            _ => Err("this is not a token of `army host token`".to_owned()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tokens_are_read_as_written() {
        let token = Token {
            secret: "ab".into(),
            fingerprint: "0".repeat(64),
        };
        assert_eq!(token.to_string().parse(), Ok(token));
        for text in ["", "army-join.a.b", "x.a.b", "army-join..0"] {
            assert!(text.parse::<Token>().is_err(), "{text}");
        }
    }
}
