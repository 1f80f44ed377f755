//! Decodes messages from an agent, without I/O: bounds them, and makes their text printable.
//!
//! Behind this module, no text of a guest is raw, except for the streams that a caller requested:
//! the output of commands, the content and the names of files, the bytes of connections.

use crate::error::ClientError;
use crate::frame::Decoder;
use crate::messages::{
    CommandInfo, Commands, Error, FromAgent, Hello, Info, MAX_ENTRIES, from_agent,
};
use crate::text::printable;

/// The most commands in a list. An agent keeps far fewer.
const MAX_COMMANDS: usize = 4096;
/// The most operations in a greeting.
const MAX_OPERATIONS: usize = 256;

/// The decoder of an agent's messages.
#[derive(Debug, Default)]
pub struct Incoming {
    decoder: Decoder,
}

impl Incoming {
    /// Adds received bytes.
    pub fn push(&mut self, bytes: &[u8]) {
        self.decoder.push(bytes);
    }

    /// The next complete message of a known kind, if it has arrived.
    ///
    /// # Errors
    /// [`ClientError::Refused`] if the message is the agent's refusal; [`ClientError::Garbled`] and
    /// [`ClientError::TooMuch`] if the connection must be closed.
    #[expect(
        clippy::should_implement_trait,
        reason = "an iterator that ends would mean that no more messages come"
    )]
    pub fn next(&mut self) -> Result<Option<from_agent::Kind>, ClientError> {
        while let Some(message) = self.decoder.next::<FromAgent>()? {
            // A kind that a newer agent added is skipped.
            if let Some(kind) = message.kind {
                return admit(kind).map(Some);
            }
        }
        Ok(None)
    }

    /// Whether a message has arrived in part.
    pub fn is_partial(&self) -> bool {
        self.decoder.is_partial()
    }
}

/// Makes the text of a message printable.
fn admit(kind: from_agent::Kind) -> Result<from_agent::Kind, ClientError> {
    use from_agent::Kind;
    Ok(match kind {
        Kind::Error(error) => {
            return Err(ClientError::Refused(Error {
                message: printable(&error.message),
                ..error
            }));
        }
        Kind::Hello(hello) => Kind::Hello(Hello {
            agent_version: printable(&hello.agent_version),
            operations: hello.operations.into_iter().take(MAX_OPERATIONS).collect(),
            ..hello
        }),
        Kind::Info(info) => Kind::Info(Info {
            hostname: printable(&info.hostname),
            kernel: printable(&info.kernel),
            ..info
        }),
        Kind::Commands(list) if list.commands.len() > MAX_COMMANDS => {
            return Err(ClientError::TooMuch(format!("{MAX_COMMANDS} commands")));
        }
        Kind::Commands(list) => Kind::Commands(Commands {
            commands: list.commands.into_iter().map(admit_command).collect(),
        }),
        Kind::Directory(page) if page.entries.len() > MAX_ENTRIES as usize => {
            return Err(ClientError::TooMuch(format!("{MAX_ENTRIES} entries")));
        }
        Kind::Notice(text) => Kind::Notice(printable(&text)),
        other => other,
    })
}

fn admit_command(info: CommandInfo) -> CommandInfo {
    CommandInfo {
        command: info.command.iter().map(|word| printable(word)).collect(),
        ..info
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::frame::encode;
    use from_agent::Kind;

    fn received(kind: Kind) -> Result<Option<Kind>, ClientError> {
        let mut bytes = Vec::new();
        encode(&FromAgent { kind: Some(kind) }, &mut bytes).unwrap();
        let mut incoming = Incoming::default();
        incoming.push(&bytes);
        incoming.next()
    }

    const EVIL: &str = "\u{1b}]52;c;ZXZpbA==\u{7}\r\n";
    const SHOWN: &str = r"\u{1b}]52;c;ZXZpbA==\u{7}\r\n";

    #[test]
    fn no_text_of_a_guest_comes_in_raw() {
        let refused = received(Kind::Error(Error {
            message: EVIL.into(),
            ..Error::default()
        }));
        assert_eq!(refused.unwrap_err().to_string(), SHOWN);
        let hello = received(Kind::Hello(Hello {
            agent_version: EVIL.into(),
            ..Hello::default()
        }));
        assert!(matches!(hello, Ok(Some(Kind::Hello(hello))) if hello.agent_version == SHOWN));
        let info = received(Kind::Info(Info {
            hostname: EVIL.into(),
            kernel: EVIL.repeat(100),
            ..Info::default()
        }));
        let Ok(Some(Kind::Info(info))) = info else {
            panic!("{info:?}")
        };
        assert_eq!(info.hostname, SHOWN);
        assert!(info.kernel.starts_with(SHOWN) && info.kernel.chars().count() <= 500);
        let commands = received(Kind::Commands(Commands {
            commands: vec![CommandInfo {
                command: vec![EVIL.into()],
                ..CommandInfo::default()
            }],
        }));
        let Ok(Some(Kind::Commands(list))) = commands else {
            panic!("{commands:?}")
        };
        assert_eq!(list.commands[0].command, [SHOWN]);
    }

    #[test]
    fn a_list_that_is_too_long_is_refused() {
        let commands = vec![CommandInfo::default(); MAX_COMMANDS + 1];
        let refused = received(Kind::Commands(Commands { commands }));
        assert!(matches!(refused, Err(ClientError::TooMuch(_))));
    }

    #[test]
    fn a_message_is_partial_from_its_first_byte_to_its_last() {
        let mut bytes = Vec::new();
        let kind = Some(Kind::InputTaken(7));
        encode(&FromAgent { kind }, &mut bytes).unwrap();
        let mut incoming = Incoming::default();
        assert!(!incoming.is_partial());
        for byte in &bytes {
            assert_eq!(incoming.next().unwrap(), None);
            incoming.push(std::slice::from_ref(byte));
            assert!(incoming.is_partial());
        }
        assert!(incoming.next().unwrap().is_some());
        assert!(!incoming.is_partial());
    }
}
