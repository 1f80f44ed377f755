//! Just enough ELF to tell a bootable x86-64 `vmlinux` from anything else, and to read a kernel module's `.modinfo`.
//!
//! Every offset is untrusted: all reads go through bounds-checked slices. The loader that later maps the kernel does
//! its own checks; these exist so that a bad file is named when the image is made and not when the guest hangs.
//! (System V gABI, chapters 4 and 5; Linux `Documentation/arch/x86/boot.rst` for the PVH note)

const CLASS_64: u8 = 2;
const DATA_LE: u8 = 1;
const TYPE_EXEC: u16 = 2;
const TYPE_DYN: u16 = 3;
const MACHINE_X86_64: u16 = 62;
const PT_LOAD: u32 = 1;
const PT_INTERP: u32 = 3;
const PT_NOTE: u32 = 4;
/// `XEN_ELFNOTE_PHYS32_ENTRY`, the note that names the 32-bit PVH entry point.
const NOTE_PVH_ENTRY: u32 = 18;

/// The facts in a `vmlinux`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Vmlinux {
    /// It has a PVH entry point.
    pub(crate) pvh: bool,
}

/// A view of an ELF file's bytes.
pub(crate) struct Elf<'a> {
    bytes: &'a [u8],
}

fn field<const N: usize>(bytes: &[u8], at: u64) -> Result<[u8; N], String> {
    let at = usize::try_from(at).map_err(|_| "an offset lies beyond the file".to_owned())?;
    let end = at.checked_add(N).ok_or("an offset wraps around")?;
    bytes
        .get(at..end)
        .and_then(|slice| slice.try_into().ok())
        .ok_or_else(|| format!("it ends before offset {end:#x}, where its headers point"))
}

fn u16_at(bytes: &[u8], at: u64) -> Result<u16, String> {
    field(bytes, at).map(u16::from_le_bytes)
}

fn u32_at(bytes: &[u8], at: u64) -> Result<u32, String> {
    field(bytes, at).map(u32::from_le_bytes)
}

fn u64_at(bytes: &[u8], at: u64) -> Result<u64, String> {
    field(bytes, at).map(u64::from_le_bytes)
}

impl<'a> Elf<'a> {
    /// True if these first bytes of a file are an ELF file's.
    pub(crate) fn is_magic(head: &[u8]) -> bool {
        head.starts_with(b"\x7fELF")
    }

    /// Checks the identification: 64-bit, little-endian, x86-64.
    pub(crate) fn parse(bytes: &'a [u8]) -> Result<Self, String> {
        if !Self::is_magic(bytes) {
            return Err("it has no ELF magic".to_owned());
        }
        let ident: [u8; 2] = field(bytes, 4)?;
        if ident != [CLASS_64, DATA_LE] || u16_at(bytes, 18)? != MACHINE_X86_64 {
            return Err("it is an ELF file, but not for x86-64".to_owned());
        }
        Ok(Self { bytes })
    }

    fn slice(&self, offset: u64, length: u64) -> Result<&'a [u8], String> {
        let end = offset
            .checked_add(length)
            .ok_or("a segment's end wraps around")?;
        let (from, to) = (usize::try_from(offset), usize::try_from(end));
        let (Ok(from), Ok(to)) = (from, to) else {
            return Err("a segment lies beyond the file".to_owned());
        };
        self.bytes.get(from..to).ok_or_else(|| {
            format!(
                "a segment ends at {end:#x}, but the file has {:#x} bytes: it is truncated",
                self.bytes.len()
            )
        })
    }

    /// Checks that this is an executable with loadable segments that are all inside the file.
    pub(crate) fn vmlinux(&self) -> Result<Vmlinux, String> {
        let (mut loads, mut pvh) = (0, false);
        for (kind, header) in self.program_headers()? {
            if kind != PT_LOAD && kind != PT_NOTE {
                continue;
            }
            let segment = self.slice(
                u64_at(self.bytes, header + 8)?,
                u64_at(self.bytes, header + 32)?,
            )?;
            if kind == PT_LOAD {
                loads += 1;
            } else {
                pvh |= has_pvh_note(segment);
            }
        }
        if loads == 0 {
            return Err("it has nothing to load".to_owned());
        }
        Ok(Vmlinux { pvh })
    }

    /// The physical address behind the last byte that the segments take up in memory, `.bss` included.
    pub(crate) fn load_end(&self) -> Result<u64, String> {
        let mut last = 0;
        for (kind, header) in self.program_headers()? {
            if kind == PT_LOAD {
                let (start, size) = (
                    u64_at(self.bytes, header + 24)?,
                    u64_at(self.bytes, header + 40)?,
                );
                last = last.max(
                    start
                        .checked_add(size)
                        .ok_or("a segment's end wraps around")?,
                );
            }
        }
        Ok(last)
    }

    /// True for an executable that asks for no dynamic loader.
    pub(crate) fn is_static(&self) -> Result<bool, String> {
        Ok(self
            .program_headers()?
            .iter()
            .all(|(kind, _)| *kind != PT_INTERP))
    }

    /// The program headers of an executable: types, and where each lies in the file.
    fn program_headers(&self) -> Result<Vec<(u32, u64)>, String> {
        let kind = u16_at(self.bytes, 16)?;
        if kind != TYPE_EXEC && kind != TYPE_DYN {
            return Err("it is an ELF file, but not an executable".to_owned());
        }
        let table = u64_at(self.bytes, 32)?;
        let (size, count) = (u16_at(self.bytes, 54)?, u16_at(self.bytes, 56)?);
        if size < 56 {
            return Err(format!(
                "its program headers have {size} bytes where 56 are needed"
            ));
        }
        (0..u64::from(count))
            .map(|index| {
                let header = table
                    .checked_add(index * u64::from(size))
                    .filter(|at| at.checked_add(64).is_some())
                    .ok_or("its program headers wrap around")?;
                Ok((u32_at(self.bytes, header)?, header))
            })
            .collect()
    }

    /// The contents of the section with this name, if there is one.
    pub(crate) fn section(&self, wanted: &str) -> Result<Option<&'a [u8]>, String> {
        let table = u64_at(self.bytes, 40)?;
        let (size, count, names) = (
            u16_at(self.bytes, 58)?,
            u16_at(self.bytes, 60)?,
            u16_at(self.bytes, 62)?,
        );
        if table == 0 || size < 64 {
            return Ok(None);
        }
        let header = |index: u16| {
            table
                .checked_add(u64::from(index) * u64::from(size))
                .ok_or_else(|| "its section headers wrap".to_owned())
        };
        let contents =
            |at: u64| self.slice(u64_at(self.bytes, at + 24)?, u64_at(self.bytes, at + 32)?);
        let strings = contents(header(names)?)?;
        for index in 0..count {
            let at = header(index)?;
            let name = strings
                .get(u32_at(self.bytes, at)? as usize..)
                .unwrap_or_default();
            if name
                .strip_prefix(wanted.as_bytes())
                .is_some_and(|rest| rest.first() == Some(&0))
            {
                return contents(at).map(Some);
            }
        }
        Ok(None)
    }
}

/// Walks a note segment: name length, descriptor length, type, then both padded to four bytes.
fn has_pvh_note(mut notes: &[u8]) -> bool {
    while let (Ok(name), Ok(desc), Ok(kind)) =
        (u32_at(notes, 0), u32_at(notes, 4), u32_at(notes, 8))
    {
        let padded = |n: u32| (n as usize).next_multiple_of(4);
        if kind == NOTE_PVH_ENTRY && notes.get(12..16) == Some(b"Xen\0") {
            return true;
        }
        match notes.get(12 + padded(name) + padded(desc)..) {
            Some(rest) => notes = rest,
            None => return false,
        }
    }
    false
}

#[cfg(test)]
pub(crate) mod testing {
    /// An ELF executable with one loadable segment of `payload`, and a PVH note if asked for.
    pub(crate) fn vmlinux(payload: &[u8], pvh: bool) -> Vec<u8> {
        let mut note = Vec::new();
        if pvh {
            for word in [4u32, 4, 18] {
                note.extend_from_slice(&word.to_le_bytes());
            }
            note.extend_from_slice(b"Xen\0\x00\x00\x00\x01");
        }
        let phnum: u16 = if pvh { 2 } else { 1 };
        let data_at = 64 + 56 * u64::from(phnum);
        let mut elf = b"\x7fELF\x02\x01\x01".to_vec();
        elf.resize(16, 0);
        elf.extend_from_slice(&2u16.to_le_bytes());
        elf.extend_from_slice(&62u16.to_le_bytes());
        elf.extend_from_slice(&1u32.to_le_bytes());
        elf.extend_from_slice(&0x100_0000u64.to_le_bytes());
        elf.extend_from_slice(&64u64.to_le_bytes());
        elf.extend_from_slice(&[0; 12]);
        for half in [64u16, 56, phnum, 0, 0, 0] {
            elf.extend_from_slice(&half.to_le_bytes());
        }
        let mut header = |kind: u32, offset: u64, size: u64| {
            elf.extend_from_slice(&kind.to_le_bytes());
            elf.extend_from_slice(&5u32.to_le_bytes());
            for word in [offset, 0x100_0000, 0x100_0000, size, size, 4096] {
                elf.extend_from_slice(&word.to_le_bytes());
            }
        };
        header(1, data_at, payload.len() as u64);
        if pvh {
            header(4, data_at + payload.len() as u64, note.len() as u64);
        }
        elf.extend_from_slice(payload);
        elf.extend_from_slice(&note);
        elf
    }
}
