//! Frames: a length (four bytes, little-endian), then a protobuf message of that many bytes.

use prost::Message;

use crate::messages::{FromAgent, FromHost};

/// The longest message, in bytes, that an agent of the first release accepts, and that any agent
/// sends.
pub const FIRST_MAX_MESSAGE: usize = 1 << 20;

/// A message that is sent in a frame.
pub trait Framed: Message {
    /// The longest message of this kind, in bytes.
    const MAX: usize;
}

impl Framed for FromHost {
    /// The limit exceeds what Linux passes to a program: arguments and environment have at most 6
    /// MiB.
    const MAX: usize = 8 << 20;
}

impl Framed for FromAgent {
    /// Chunks of data are far smaller, and a guest must not cost its host more memory.
    const MAX: usize = FIRST_MAX_MESSAGE;
}

const LENGTH_BYTES: usize = 4;

/// The reason why a stream is invalid. It cannot be recovered, so the connection must end.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum FrameError {
    /// The message exceeds the limit: the peer uses another protocol, or is hostile.
    #[error("a message of {len} bytes; at most {max} are allowed")]
    TooLong {
        /// The length of the message.
        len: usize,
        /// The limit.
        max: usize,
    },
    /// The bytes are not a message.
    #[error("a message that cannot be decoded: {0}")]
    Malformed(String),
}

/// Appends `message` to `out` as a frame.
///
/// # Errors
/// The message is too long; `out` is unchanged then.
pub fn encode<M: Framed>(message: &M, out: &mut Vec<u8>) -> Result<(), FrameError> {
    let len = message.encoded_len();
    check::<M>(len)?;
    out.reserve(LENGTH_BYTES + len);
    out.extend_from_slice(&(len as u32).to_le_bytes());
    // A vector grows as needed, so there is always room.
    message.encode_raw(out);
    Ok(())
}

fn check<M: Framed>(len: usize) -> Result<(), FrameError> {
    match len > M::MAX {
        true => Err(FrameError::TooLong { len, max: M::MAX }),
        false => Ok(()),
    }
}

/// Extracts messages from bytes that arrive in pieces of any size.
#[derive(Debug, Default)]
pub struct Decoder {
    buffer: Vec<u8>,
    /// The number of bytes at the start of the buffer that were already returned.
    taken: usize,
}

impl Decoder {
    /// Adds received bytes.
    pub fn push(&mut self, bytes: &[u8]) {
        if self.taken > 0 {
            self.buffer.drain(..self.taken);
            self.taken = 0;
        }
        self.buffer.extend_from_slice(bytes);
    }

    /// Whether bytes remain of an incomplete message, or of one that was not taken.
    pub fn is_partial(&self) -> bool {
        self.taken < self.buffer.len()
    }

    /// The next complete message, if it has arrived.
    ///
    /// # Errors
    /// The stream is invalid, and must be closed.
    #[expect(
        clippy::should_implement_trait,
        reason = "it is no iterator: the type is the caller's choice at each call"
    )]
    pub fn next<M: Framed + Default>(&mut self) -> Result<Option<M>, FrameError> {
        let rest = &self.buffer[self.taken..];
        let Some((length, rest)) = rest.split_first_chunk::<LENGTH_BYTES>() else {
            return Ok(None);
        };
        let len = u32::from_le_bytes(*length) as usize;
        check::<M>(len)?;
        let Some(body) = rest.get(..len) else {
            return Ok(None);
        };
        let message = M::decode(body).map_err(|error| FrameError::Malformed(error.to_string()))?;
        self.taken += LENGTH_BYTES + len;
        Ok(Some(message))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::messages::{FromAgent, Hello, from_agent::Kind};
    use proptest::prelude::*;

    fn hello(version: &str) -> FromAgent {
        let hello = Hello {
            protocol: 1,
            agent_version: version.to_owned(),
            ..Hello::default()
        };
        FromAgent {
            kind: Some(Kind::Hello(hello)),
        }
    }

    proptest! {
        #[test]
        fn messages_come_back_however_the_stream_is_cut(
            versions in prop::collection::vec(".{0,40}", 1..5), cut in 1usize..16,
        ) {
            let mut stream = Vec::new();
            for version in &versions {
                encode(&hello(version), &mut stream).unwrap();
            }
            let mut decoder = Decoder::default();
            let mut seen = Vec::new();
            for piece in stream.chunks(cut) {
                decoder.push(piece);
                while let Some(message) = decoder.next::<FromAgent>().unwrap() {
                    seen.push(message);
                }
            }
            prop_assert_eq!(seen, versions.iter().map(|v| hello(v)).collect::<Vec<_>>());
        }

        #[test]
        fn garbage_is_an_error_or_incomplete_but_never_a_panic(
            bytes in prop::collection::vec(any::<u8>(), 0..200),
        ) {
            let mut decoder = Decoder::default();
            decoder.push(&bytes);
            while let Ok(Some(_)) = decoder.next::<FromAgent>() {}
        }
    }

    #[test]
    fn a_huge_length_is_refused_before_anything_is_allocated() {
        let mut decoder = Decoder::default();
        decoder.push(&u32::MAX.to_le_bytes());
        assert_eq!(
            decoder.next::<FromAgent>(),
            Err(FrameError::TooLong {
                len: u32::MAX as usize,
                max: 1 << 20
            })
        );
    }
}
