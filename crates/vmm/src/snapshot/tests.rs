//! A file is read back as it was written, or refused by the name of what is wrong.

use super::*;

fn state() -> MachineState {
    MachineState {
        vcpus: vec![VcpuState::blank(), VcpuState::blank()],
        board: BoardState::fresh(),
        clock: VmClock {
            nanoseconds: 1_234_567_890_123,
        },
        devices: Vec::new(),
    }
}

#[test]
fn a_state_is_read_back_as_it_was() {
    let bytes = encode(&state()).unwrap();
    assert_eq!(decode(&bytes).unwrap(), state());
}

#[test]
fn version_1_keeps_its_bytes() {
    // Written by the first version; a change of any structure inside changes the hash.
    let bytes = encode(&state()).unwrap();
    assert_eq!(blake3::hash(&bytes).to_hex()[..16], *"3b56e3b842801aa8");
}

#[test]
fn every_flipped_bit_and_every_cut_is_refused() {
    let bytes = encode(&state()).unwrap();
    for at in 0..bytes.len() {
        let mut flipped = bytes.clone();
        flipped[at] ^= 1 << (at % 8);
        assert!(decode(&flipped).is_err(), "bit in byte {at}");
    }
    for len in 0..bytes.len() {
        assert!(decode(&bytes[..len]).is_err(), "cut to {len}");
    }
    let longer = [bytes.as_slice(), &[0]].concat();
    assert_eq!(decode(&longer), Err(SnapshotError::TooLong { bytes: 1 }));
}

#[test]
fn a_newer_format_is_named() {
    let mut bytes = encode(&state()).unwrap();
    bytes[8] = 2;
    assert_eq!(decode(&bytes), Err(SnapshotError::TooNew { found: 2 }));
}

#[test]
fn a_length_beyond_the_file_is_a_cut_and_reserves_nothing() {
    let mut bytes = encode(&state()).unwrap();
    bytes[20..28].copy_from_slice(&u64::MAX.to_le_bytes());
    let cut = SnapshotError::Cut { section: "vcpus" };
    assert_eq!(decode(&bytes), Err(cut));
}

#[test]
fn a_right_checksum_over_nonsense_is_still_refused() {
    let mut bytes = MAGIC.to_vec();
    bytes.extend(VERSION.to_le_bytes());
    let content = [0xFF; 9];
    bytes.extend(name_bytes("vcpus"));
    bytes.extend((content.len() as u64).to_le_bytes());
    bytes.extend(blake3::hash(&content).as_bytes());
    bytes.extend(content);
    let error = decode(&bytes).unwrap_err();
    assert!(
        matches!(
            error,
            SnapshotError::Nonsense {
                section: "vcpus",
                ..
            }
        ),
        "{error}"
    );
}
