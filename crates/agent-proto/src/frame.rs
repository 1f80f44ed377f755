//! Frames: a length (four bytes, little-endian), then a protobuf message of that many bytes.

use prost::Message;

use crate::messages::{FromAgent, FromHost};

/// The longest message that an agent of the first release takes (bytes), and that any agent sends.
pub const FIRST_MAX_MESSAGE: usize = 1 << 20;

/// What travels in a frame.
pub trait Framed: Message {
    /// The longest one (bytes).
    const MAX: usize;
}

impl Framed for FromHost {
    /// More than Linux gives a program: its arguments and environment have 6 MiB at most.
    const MAX: usize = 8 << 20;
}

impl Framed for FromAgent {
    /// Data comes in chunks far below it, and a guest must not cost its host more.
    const MAX: usize = FIRST_MAX_MESSAGE;
}

const LENGTH_BYTES: usize = 4;

/// Why a stream cannot be understood. There is no way back: the connection must end.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum FrameError {
    /// Longer than it may be: not our protocol, or a hostile peer.
    #[error("a message of {len} bytes; at most {max} are allowed")]
    TooLong {
        /// How long it is.
        len: usize,
        /// How long it may be.
        max: usize,
    },
    /// Not a message.
    #[error("a message that cannot be decoded: {0}")]
    Malformed(String),
}

/// Appends `message` to `out` as a frame.
///
/// # Errors
/// Where the message is too long; `out` is unchanged then.
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

/// Cuts messages out of bytes as they arrive, in pieces of any size.
#[derive(Debug, Default)]
pub struct Decoder {
    buffer: Vec<u8>,
    /// How much of the buffer was handed out already.
    taken: usize,
}

impl Decoder {
    /// Adds bytes that arrived.
    pub fn push(&mut self, bytes: &[u8]) {
        if self.taken > 0 {
            self.buffer.drain(..self.taken);
            self.taken = 0;
        }
        self.buffer.extend_from_slice(bytes);
    }

    /// Whether bytes are left that are no whole message yet, or one that was not taken.
    pub fn is_partial(&self) -> bool {
        self.taken < self.buffer.len()
    }

    /// The next whole message, if it has arrived.
    ///
    /// # Errors
    /// Where the stream cannot be understood; it must be given up then.
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
