//! A small assembler of classic BPF, which the kernel's traffic control runs on each frame.
//!
//! Programs are built of nested blocks, so there are no labels: a condition skips the block after
//! it. A load beyond a frame's end ends the program with 0, which is [`REJECT`], so no length needs
//! an explicit check. Source: the Linux kernel's `networking/filter.rst`.

use std::net::Ipv6Addr;

use clone_api::MacAddr;

/// The program's result that lets the frame pass.
const ACCEPT: u32 = 1;
/// The program's result that drops the frame, also the result of a load beyond the frame's end.
const REJECT: u32 = 0;

/// The offset of metadata about a frame, which is not in its bytes (`SKF_AD_OFF`).
const ANCILLARY: u32 = 0xffff_f000;

const LOAD_WORD: u16 = 0x20;
const LOAD_HALF: u16 = 0x28;
const LOAD_BYTE: u16 = 0x30;
const AND: u16 = 0x54;
const JUMP: u16 = 0x05;
const JUMP_EQUAL: u16 = 0x15;
const RETURN: u16 = 0x06;

/// One instruction (`struct sock_filter`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Instruction {
    code: u16,
    jump_true: u8,
    jump_false: u8,
    operand: u32,
}

/// A value that a program can load, by its offset from the frame's first byte.
#[derive(Clone, Copy, Debug)]
pub(super) enum Field {
    Byte(u32),
    Half(u32),
    Word(u32),
    /// Some bits of a half-word, by offset and mask.
    HalfBits(u32, u32),
    /// Some bits of a byte, by offset and mask.
    ByteBits(u32, u32),
    /// Some bits of a word, by offset and mask.
    WordBits(u32, u32),
    /// Whether the kernel removed a VLAN tag from the frame: 1 or 0.
    VlanTagged,
    /// The mark that the packet filter set.
    Mark,
}

impl Field {
    fn load(self) -> Program {
        let (code, offset, mask) = match self {
            Self::Byte(offset) => (LOAD_BYTE, offset, None),
            Self::Half(offset) => (LOAD_HALF, offset, None),
            Self::Word(offset) => (LOAD_WORD, offset, None),
            Self::ByteBits(offset, mask) => (LOAD_BYTE, offset, Some(mask)),
            Self::HalfBits(offset, mask) => (LOAD_HALF, offset, Some(mask)),
            Self::WordBits(offset, mask) => (LOAD_WORD, offset, Some(mask)),
            // `SKF_AD_VLAN_TAG_PRESENT` and `SKF_AD_MARK`.
            Self::VlanTagged => (LOAD_BYTE, ANCILLARY + 48, None),
            Self::Mark => (LOAD_WORD, ANCILLARY + 20, None),
        };
        let mut program = Program::default();
        program.push(code, 0, 0, offset);
        if let Some(mask) = mask {
            program.push(AND, 0, 0, mask);
        }
        program
    }
}

/// A conjunction: fields, and the values that they must all have.
pub(super) type Condition = Vec<(Field, u32)>;

/// Whether `field` is `value`.
pub(super) fn is(field: Field, value: u32) -> Condition {
    vec![(field, value)]
}

/// Whether the station's address at `offset` is `mac`.
pub(super) fn mac_at(offset: u32, mac: MacAddr) -> Condition {
    let [a, b, c, d, e, f] = mac.0;
    vec![
        (Field::Word(offset), u32::from_be_bytes([a, b, c, d])),
        (Field::Half(offset + 4), u32::from_be_bytes([0, 0, e, f])),
    ]
}

/// Whether the address at `offset` is `address`.
pub(super) fn ipv6_at(offset: u32, address: Ipv6Addr) -> Condition {
    let bits = address.to_bits();
    (0..4)
        .map(|word| {
            let value = bits >> (96 - 32 * word) & u128::from(u32::MAX);
            (Field::Word(offset + 4 * word), value as u32)
        })
        .collect()
}

/// A program, or a block of one. Execution continues after the end of a block with the next one.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Program {
    instructions: Vec<Instruction>,
}

impl Program {
    /// Concatenates `parts` to one block.
    pub(super) fn of(parts: impl IntoIterator<Item = Self>) -> Self {
        Self {
            instructions: parts
                .into_iter()
                .flat_map(|part| part.instructions)
                .collect(),
        }
    }

    /// Lets the frame pass.
    pub(super) fn accept() -> Self {
        Self::answer(ACCEPT)
    }

    /// Drops the frame.
    pub(super) fn reject() -> Self {
        Self::answer(REJECT)
    }

    /// Ends the program with this result.
    pub(super) fn answer(answer: u32) -> Self {
        let mut program = Self::default();
        program.push(RETURN, 0, 0, answer);
        program
    }

    /// Runs `block` where `condition` holds.
    pub(super) fn when(condition: Condition, block: Self) -> Self {
        condition
            .into_iter()
            .rev()
            .fold(block, |block, (field, value)| {
                let mut test = field.load();
                test.push(JUMP_EQUAL, 1, 0, value);
                test.push_jump(block.len());
                Self::of([test, block])
            })
    }

    /// Runs `block` where `condition` does not hold.
    pub(super) fn unless(condition: Condition, block: Self) -> Self {
        let mut skip = Self::default();
        skip.push_jump(block.len());
        let tests = condition
            .into_iter()
            .rev()
            .fold(skip, |rest, (field, value)| {
                let mut test = field.load();
                test.push(JUMP_EQUAL, 1, 0, value);
                test.push_jump(rest.len());
                Self::of([test, rest])
            });
        Self::of([tests, block])
    }

    /// Drops the frame unless `condition` holds.
    pub(super) fn require(condition: Condition) -> Self {
        Self::unless(condition, Self::reject())
    }

    /// Drops the frame unless one of `conditions` holds.
    pub(super) fn require_one(conditions: impl IntoIterator<Item = Condition>) -> Self {
        conditions
            .into_iter()
            .fold(Self::reject(), |others, condition| {
                Self::unless(condition, others)
            })
    }

    /// Drops the frame unless `field` has one of `values`.
    pub(super) fn require_value(field: Field, values: &[u32]) -> Self {
        Self::require_one(values.iter().map(|&value| is(field, value)))
    }

    /// The instructions as the kernel takes them, and their number.
    pub(super) fn encode(&self) -> (Vec<u8>, usize) {
        let bytes = self.instructions.iter().flat_map(|instruction| {
            let mut bytes = instruction.code.to_ne_bytes().to_vec();
            bytes.extend([instruction.jump_true, instruction.jump_false]);
            bytes.extend(instruction.operand.to_ne_bytes());
            bytes
        });
        (bytes.collect(), self.instructions.len())
    }

    fn push(&mut self, code: u16, jump_true: u8, jump_false: u8, operand: u32) {
        self.instructions.push(Instruction {
            code,
            jump_true,
            jump_false,
            operand,
        });
    }

    fn push_jump(&mut self, over: usize) {
        self.push(JUMP, 0, 0, over as u32);
    }

    fn len(&self) -> usize {
        self.instructions.len()
    }
}

#[cfg(test)]
impl Program {
    /// Whether `frame` passes, by the rules of the kernel's interpreter.
    pub(super) fn passes(&self, frame: &[u8], vlan_tagged: bool, mark: u32) -> bool {
        let load = |offset: u32, len: usize| -> Option<u32> {
            match offset.checked_sub(ANCILLARY) {
                Some(48) => Some(u32::from(vlan_tagged)),
                Some(20) => Some(mark),
                _ => {
                    let bytes = frame.get(offset as usize..)?.get(..len)?;
                    Some(
                        bytes
                            .iter()
                            .fold(0, |all, &byte| all << 8 | u32::from(byte)),
                    )
                }
            }
        };
        let (mut accumulator, mut next) = (0, 0);
        loop {
            let it = self.instructions[next];
            next += 1;
            let loaded = match it.code {
                LOAD_WORD => load(it.operand, 4),
                LOAD_HALF => load(it.operand, 2),
                LOAD_BYTE => load(it.operand, 1),
                AND => Some(accumulator & it.operand),
                JUMP => {
                    next += it.operand as usize;
                    Some(accumulator)
                }
                JUMP_EQUAL => {
                    next += usize::from(if accumulator == it.operand {
                        it.jump_true
                    } else {
                        it.jump_false
                    });
                    Some(accumulator)
                }
                RETURN => return it.operand != REJECT,
                code => panic!("{code:#x} is no instruction of ours"),
            };
            match loaded {
                Some(value) => accumulator = value,
                None => return false,
            }
        }
    }
}
