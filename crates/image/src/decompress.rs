//! Decompression of everything this crate is given: kernel payloads, kernel modules, image layers.
//!
//! All decoders are pure Rust and bounded: in memory by the window or dictionary limits below, in output by
//! [`read_bounded`]. Which format a stream has is told by its first bytes, never by its name.

use std::io::{self, BufRead, Read};

use ruzstd::decoding::errors::{FrameDecoderError, ReadFrameHeaderError};
use ruzstd::decoding::{BlockDecodingStrategy, FrameDecoder};

/// The most memory an LZMA or XZ dictionary may take, in KiB. `xz -9` needs 64 MiB, Linux uses up to 128 MiB.
const LZMA_MEMORY_KIB: u32 = 192 << 10;
/// The block size of the legacy LZ4 container, fixed by its format.
const LZ4_LEGACY_BLOCK: usize = 8 << 20;
const LZ4_LEGACY_MAGIC: [u8; 4] = [0x02, 0x21, 0x4c, 0x18];

/// A compression format, as told by a stream's first bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Compression {
    Gzip,
    Xz,
    /// The headerless predecessor of XZ ("lzma alone").
    Lzma,
    Zstd,
    /// The container that Linux uses, without checksums.
    Lz4Legacy,
}

impl Compression {
    /// Recognises a stream by at least its first six bytes; `None` for anything unknown (such as plain data).
    pub(crate) fn detect(head: &[u8]) -> Option<Self> {
        match head {
            [0x1f, 0x8b, ..] => Some(Self::Gzip),
            [0xfd, b'7', b'z', b'X', b'Z', 0, ..] => Some(Self::Xz),
            [0x5d, 0, 0, ..] => Some(Self::Lzma),
            [0x28, 0xb5, 0x2f, 0xfd, ..] => Some(Self::Zstd),
            [0x02, 0x21, 0x4c, 0x18, ..] => Some(Self::Lz4Legacy),
            _ => None,
        }
    }

    /// A reader of the decompressed bytes. Concatenated members are read as one stream, as the formats' tools do.
    pub(crate) fn reader<'a>(self, input: impl BufRead + 'a) -> io::Result<Box<dyn Read + 'a>> {
        Ok(match self {
            Self::Gzip => Box::new(flate2::bufread::MultiGzDecoder::new(input)),
            Self::Xz => Box::new(lzma_rust2::XzReader::new_mem_limit(
                input,
                true,
                LZMA_MEMORY_KIB,
            )),
            Self::Lzma => Box::new(lzma_rust2::LzmaReader::new_mem_limit(
                input,
                LZMA_MEMORY_KIB,
                None,
            )?),
            Self::Zstd => Box::new(ZstdReader {
                input,
                decoder: FrameDecoder::new(),
                in_frame: false,
            }),
            Self::Lz4Legacy => Box::new(Lz4LegacyReader {
                input,
                block: Vec::new(),
                at: 0,
                started: false,
            }),
        })
    }
}

/// Why [`read_bounded`] gave up.
#[derive(Debug)]
pub(crate) enum BoundedError {
    TooLong,
    Io(io::Error),
}

/// Reads a whole stream that must not be longer than `limit` bytes.
pub(crate) fn read_bounded(reader: impl Read, limit: u64) -> Result<Vec<u8>, BoundedError> {
    let mut out = Vec::new();
    let read = reader
        .take(limit.saturating_add(1))
        .read_to_end(&mut out)
        .map_err(BoundedError::Io)?;
    if read as u64 > limit {
        return Err(BoundedError::TooLong);
    }
    Ok(out)
}

/// Reads a sequence of Zstandard frames, skippable ones left out. (RFC 8878)
struct ZstdReader<R> {
    input: R,
    decoder: FrameDecoder,
    in_frame: bool,
}

impl<R: BufRead> ZstdReader<R> {
    /// Begins the next frame; false at the end of the input.
    fn begin_frame(&mut self) -> io::Result<bool> {
        loop {
            if self.input.fill_buf()?.is_empty() {
                return Ok(false);
            }
            match self.decoder.reset(&mut self.input) {
                Ok(()) => return Ok(true),
                Err(FrameDecoderError::ReadFrameHeaderError(ReadFrameHeaderError::SkipFrame {
                    length,
                    ..
                })) => {
                    let length = u64::from(length);
                    if io::copy(&mut (&mut self.input).take(length), &mut io::sink())? < length {
                        return Err(io::ErrorKind::UnexpectedEof.into());
                    }
                }
                Err(e) => return Err(io::Error::new(io::ErrorKind::InvalidData, e.to_string())),
            }
        }
    }
}

impl<R: BufRead> Read for ZstdReader<R> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        loop {
            if self.in_frame && self.decoder.can_collect() > 0 {
                return self.decoder.read(buf);
            }
            if self.in_frame && !self.decoder.is_finished() {
                self.decoder
                    .decode_blocks(&mut self.input, BlockDecodingStrategy::UptoBytes(1 << 20))
                    .map_err(|e| io::Error::new(io::ErrorKind::InvalidData, e.to_string()))?;
                continue;
            }
            self.in_frame = self.begin_frame()?;
            if !self.in_frame {
                return Ok(0);
            }
        }
    }
}

/// Reads Linux's LZ4 container: a magic, then blocks of at most 8 MiB, each behind its compressed length.
struct Lz4LegacyReader<R> {
    input: R,
    block: Vec<u8>,
    at: usize,
    started: bool,
}

impl<R: BufRead> Lz4LegacyReader<R> {
    fn next_block(&mut self) -> io::Result<bool> {
        let mut word = [0; 4];
        loop {
            if self.input.fill_buf()?.is_empty() {
                return Ok(false);
            }
            self.input.read_exact(&mut word)?;
            // Files may be concatenated: a magic where a length is due starts the next one.
            if word != LZ4_LEGACY_MAGIC {
                break;
            }
            self.started = true;
        }
        let length = u32::from_le_bytes(word) as usize;
        // Incompressible blocks grow by one byte in 255, and a little.
        if !self.started || length == 0 || length > LZ4_LEGACY_BLOCK + LZ4_LEGACY_BLOCK / 255 + 16 {
            return Err(io::Error::new(
                io::ErrorKind::InvalidData,
                format!("LZ4 block of {length} bytes"),
            ));
        }
        let mut packed = vec![0; length];
        self.input.read_exact(&mut packed)?;
        self.block = lz4_flex::block::decompress(&packed, LZ4_LEGACY_BLOCK)
            .map_err(|e| io::Error::new(io::ErrorKind::InvalidData, e.to_string()))?;
        self.at = 0;
        Ok(true)
    }
}

impl<R: BufRead> Read for Lz4LegacyReader<R> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        while self.at == self.block.len() {
            if !self.next_block()? {
                return Ok(0);
            }
        }
        let n = buf.len().min(self.block.len() - self.at);
        buf[..n].copy_from_slice(&self.block[self.at..self.at + n]);
        self.at += n;
        Ok(n)
    }
}
