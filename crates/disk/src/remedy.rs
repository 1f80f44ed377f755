//! What makes a file usable that is refused: commands that can be pasted into a shell.

use std::ffi::OsString;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

/// What helps with a file that is refused as a disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Remedy {
    /// Nothing that is known here.
    Unknown,
    /// `qemu-img convert` from the format that QEMU calls so.
    Convert(&'static str),
    /// `qemu-img convert` with the passphrase, from the format that QEMU calls so.
    Decrypt(&'static str),
    /// `qemu-img check -r all`.
    Repair,
    /// A program that unpacks its standard input.
    Unpack(&'static str),
    /// A program that is given the archive's name.
    Extract(&'static str),
    /// `simg2img`, which knows Android's sparse images.
    Desparse,
    /// The backing file, given by the caller, or a copy that needs none.
    GiveBacking,
    /// A newer program, or a copy in the format's plain form.
    Plain,
    /// The image that the file is a layer of.
    GiveBase,
}

impl Remedy {
    /// The advice for the file at `path`: a command, or what to give instead.
    pub fn advice(self, path: &Path) -> String {
        let file = quoted(path);
        let copy = || quoted(&with_extension(path, "qcow2"));
        match self {
            Self::Unknown => "make a new image, or use another copy".to_owned(),
            Self::Convert(format) => {
                format!("qemu-img convert -f {format} -O qcow2 {file} {}", copy())
            }
            Self::Decrypt(format) => {
                let key = if format == "luks" { "" } else { "encrypt." };
                // QEMU's options end at a comma, and a doubled one stands for itself.
                let name = doubled_commas(path);
                let options = format!("driver={format},{key}key-secret=key,file.filename=");
                let options = quoted_bytes(&[options.as_bytes(), &name].concat());
                format!(
                    "qemu-img convert --object secret,id=key,file=PASSPHRASE_FILE \
                     --image-opts {options} -O qcow2 {}",
                    copy()
                )
            }
            Self::Repair => format!("qemu-img check -r all {file}"),
            Self::Unpack(program) => {
                format!("{program} < {file} > {}", quoted(&unpacked(path)))
            }
            Self::Extract(program) => format!("{program} {file}, and give the disk that is in it"),
            Self::Desparse => {
                format!("simg2img {file} {}", quoted(&with_extension(path, "raw")))
            }
            Self::GiveBacking => format!(
                "give its backing file with backing=FILE; or, if you trust where the image comes \
                 from, make one file of both: qemu-img convert -f qcow2 -O qcow2 {file} {}",
                copy()
            ),
            Self::Plain => format!(
                "if you trust where the image comes from: qemu-img convert -f qcow2 -O qcow2 \
                 {file} {}",
                copy()
            ),
            Self::GiveBase => {
                format!(
                    "give the image that it lies over, with overlay={}",
                    path.display()
                )
            }
        }
    }
}

/// A name beside `path` that it does not have itself.
fn with_extension(path: &Path, extension: &str) -> PathBuf {
    let other = path.with_extension(extension);
    if other == path {
        let mut stem = path.file_stem().unwrap_or_default().to_owned();
        stem.push("-converted");
        return path.with_file_name(stem).with_extension(extension);
    }
    other
}

/// The name of what is in a compressed file.
fn unpacked(path: &Path) -> PathBuf {
    match path.extension() {
        Some(_) => path.with_extension(""),
        None => with_extension(path, "raw"),
    }
}

fn doubled_commas(path: &Path) -> Vec<u8> {
    let mut bytes = Vec::new();
    for &byte in as_argument(path).as_bytes() {
        bytes.push(byte);
        if byte == b',' {
            bytes.push(byte);
        }
    }
    bytes
}

/// A path that no program takes for an option or a protocol (`-x`, `nbd:x`).
fn as_argument(path: &Path) -> OsString {
    if path.is_absolute() {
        return path.into();
    }
    Path::new(".").join(path).into_os_string()
}

/// A path as a shell reads it back, whatever it is.
fn quoted(path: &Path) -> String {
    quoted_bytes(as_argument(path).as_bytes())
}

fn quoted_bytes(bytes: &[u8]) -> String {
    let is_plain = |c: &u8| c.is_ascii_alphanumeric() || b"/._-+=:,@%".contains(c);
    match std::str::from_utf8(bytes) {
        Ok(text) if bytes.iter().all(is_plain) => text.to_owned(),
        Ok(text) if !text.chars().any(char::is_control) => {
            format!("'{}'", text.replace('\'', r"'\''"))
        }
        // Control characters would do things to a terminal, and other bytes cannot be printed.
        _ => {
            let escaped: String = bytes.iter().map(|byte| format!("\\{byte:03o}")).collect();
            format!("\"$(printf '{escaped}')\"")
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::ffi::OsStr;

    #[test]
    fn paths_are_quoted_so_that_a_shell_reads_them_back() {
        let names: [&[u8]; 7] = [
            b"/a/plain.img",
            b"/it's a disk.img",
            b"/$HOME;rm -rf.img",
            b"/n\xff\xfe.img",
            b"/a\x1b[31m\nb.img",
            b"-o",
            b"nbd:x,y",
        ];
        for name in names {
            let path = Path::new(OsStr::from_bytes(name));
            let word = quoted(path);
            assert!(!word.chars().any(char::is_control), "{word:?}");
            let output = std::process::Command::new("sh")
                .args(["-c", &format!("printf %s {word}")])
                .output()
                .unwrap();
            assert_eq!(output.stdout, as_argument(path).as_bytes(), "{word}");
        }
    }

    #[test]
    fn a_copy_never_has_the_name_of_the_original() {
        for (path, extension, expected) in [
            ("/a.vmdk", "qcow2", "/a.qcow2"),
            ("/a.qcow2", "qcow2", "/a-converted.qcow2"),
            ("/a", "raw", "/a.raw"),
        ] {
            assert_eq!(
                with_extension(Path::new(path), extension),
                Path::new(expected)
            );
        }
        assert_eq!(unpacked(Path::new("/a.img.xz")), Path::new("/a.img"));
    }
}
