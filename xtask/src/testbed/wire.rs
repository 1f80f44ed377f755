//! The frames of a session: a kind (one byte), a length (four, little-endian), a payload.
//!
//! Both ends are one binary of one build, so there is no version. A session starts with a random
//! [`Kind::Sync`] that the inside sends back, because the port may still hold what an earlier
//! session left.

use std::io::{self, Read, Write};

/// The largest payload.
pub(super) const MAX_PAYLOAD: usize = 32 << 10;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(super) enum Kind {
    /// Both ways: 16 random bytes, sent back.
    Sync = 1,
    /// In: fields that say what to run, see [`Start`].
    Start,
    /// In: input for the command; empty for its end.
    Stdin,
    /// In: a terminal's rows and columns, two bytes each.
    Resize,
    /// Out: what the command printed.
    Stdout,
    /// Out: what it complained of.
    Stderr,
    /// Out: how it ended, as a shell would say it (one byte).
    Exit,
    /// Out: why it did not start.
    Failed,
}

impl Kind {
    fn from_byte(byte: u8) -> Option<Self> {
        use Kind::*;
        [Sync, Start, Stdin, Resize, Stdout, Stderr, Exit, Failed]
            .into_iter()
            .find(|kind| *kind as u8 == byte)
    }
}

pub(super) fn write(out: &mut impl Write, kind: Kind, payload: &[u8]) -> io::Result<()> {
    let mut frame = Vec::with_capacity(5 + payload.len());
    frame.push(kind as u8);
    frame.extend_from_slice(&(payload.len() as u32).to_le_bytes());
    frame.extend_from_slice(payload);
    out.write_all(&frame)
}

/// Reads a frame; an unknown kind or an absurd length is an error, for the streams are out of step.
pub(super) fn read(input: &mut impl Read) -> io::Result<(Kind, Vec<u8>)> {
    let mut header = [0; 5];
    input.read_exact(&mut header)?;
    let len = u32::from_le_bytes([header[1], header[2], header[3], header[4]]) as usize;
    // The start frame holds an environment, which may be larger than a chunk of data.
    let kind = Kind::from_byte(header[0]).filter(|_| len <= 64 * MAX_PAYLOAD);
    let kind = kind.ok_or_else(|| io::Error::other("the session is out of step"))?;
    let mut payload = vec![0; len];
    input.read_exact(&mut payload)?;
    Ok((kind, payload))
}

/// What to run.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Start {
    /// Rows and columns where it gets a terminal.
    pub(super) terminal: Option<(u16, u16)>,
    pub(super) folder: String,
    pub(super) command: Vec<String>,
    pub(super) environment: Vec<(String, String)>,
}

impl Start {
    pub(super) fn encode(&self) -> Vec<u8> {
        let (rows, columns) = self.terminal.unwrap_or((0, 0));
        let mut fields = vec![
            u8::from(self.terminal.is_some()).to_string(),
            rows.to_string(),
            columns.to_string(),
            self.folder.clone(),
            self.command.len().to_string(),
        ];
        fields.extend(self.command.iter().cloned());
        fields.extend(
            self.environment
                .iter()
                .map(|(name, value)| format!("{name}={value}")),
        );
        fields.join("\0").into_bytes()
    }

    pub(super) fn decode(payload: &[u8]) -> Option<Self> {
        let text = std::str::from_utf8(payload).ok()?;
        let mut fields = text.split('\0').map(str::to_owned);
        let has_terminal = fields.next()? == "1";
        let size = (fields.next()?.parse().ok()?, fields.next()?.parse().ok()?);
        let folder = fields.next()?;
        let words: usize = fields.next()?.parse().ok()?;
        let command: Vec<_> = fields.by_ref().take(words).collect();
        let environment = fields.filter_map(|field| {
            field
                .split_once('=')
                .map(|(n, v)| (n.to_owned(), v.to_owned()))
        });
        let environment = environment.collect();
        (command.len() == words && words > 0).then_some(Self {
            terminal: has_terminal.then_some(size),
            folder,
            command,
            environment,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frames_come_back_whole() {
        let mut bytes = Vec::new();
        write(&mut bytes, Kind::Stdout, b"hello").unwrap();
        write(&mut bytes, Kind::Exit, &[3]).unwrap();
        let mut rest = bytes.as_slice();
        assert_eq!(read(&mut rest).unwrap(), (Kind::Stdout, b"hello".to_vec()));
        assert_eq!(read(&mut rest).unwrap(), (Kind::Exit, vec![3]));
    }

    #[test]
    fn frames_out_of_step_are_noticed() {
        assert!(read(&mut &[0u8; 16][..]).is_err());
        assert!(read(&mut &[2, 0xFF, 0xFF, 0xFF, 0xFF][..]).is_err());
    }

    #[test]
    fn a_start_comes_back_with_odd_words() {
        let start = Start {
            terminal: Some((24, 80)),
            folder: "/a b".to_owned(),
            command: vec![
                "sh".to_owned(),
                "-c".to_owned(),
                "echo \"x\ny\" = ".to_owned(),
            ],
            environment: vec![("A".to_owned(), "b=c".to_owned())],
        };
        assert_eq!(Start::decode(&start.encode()), Some(start));
    }
}
