use proptest::prelude::*;

use super::*;

fn machine() -> MachineSizes {
    MachineSizes {
        pages: 1000,
        disks: vec![0, 1 << 20],
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Every record, and the bytes by which version 1 says it.
const RECORDS: [(Record, &str); 11] = [
    (
        Record::Pages {
            first: 7,
            count: 64,
        },
        "010000004000000007000000000000000000000000000000",
    ),
    (
        Record::PackedPages {
            first: 8,
            count: 2,
            len: 300,
        },
        "020000000200000008000000000000002c01000000000000",
    ),
    (
        Record::ZeroPages {
            first: 0,
            count: 1000,
        },
        "03000000e803000000000000000000000000000000000000",
    ),
    (
        Record::EqualPage {
            page: 999,
            other: 1,
        },
        "0400000001000000e7030000000000000100000000000000",
    ),
    (
        Record::Blocks {
            disk: 1,
            offset: 4096,
            len: 512,
        },
        "050000000002000000100000000000000100000000000000",
    ),
    (
        Record::ZeroBlocks {
            disk: 1,
            offset: 0,
            len: 1 << 20,
        },
        "060000000000100000000000000000000100000000000000",
    ),
    (
        Record::State { at: 65536, len: 9 },
        "070000000900000000000100000000000000000000000000",
    ),
    (
        Record::Sync { number: 3 },
        "080000000000000003000000000000000000000000000000",
    ),
    (
        Record::Done { records: 5 },
        "090000000000000005000000000000000000000000000000",
    ),
    (
        Record::Go,
        "0a0000000000000000000000000000000000000000000000",
    ),
    (
        Record::Abort { len: 4 },
        "0b0000000400000000000000000000000000000000000000",
    ),
];

#[test]
fn the_bytes_of_version_1_stay_as_they_are() {
    assert_eq!(
        hex(&encode_preamble(1 << 30)),
        "434c4e4d4f56450a01000000000000000000004000000000"
    );
    for (record, golden) in RECORDS {
        let bytes = record.encode();
        assert_eq!(hex(&bytes), golden, "{record:?}");
        assert_eq!(Record::decode(&bytes, &machine()), Ok(record));
    }
    for (reply, golden) in [
        (Reply::Synced(3), "01000000000000000300000000000000"),
        (Reply::Ready, "02000000000000000000000000000000"),
        (Reply::Running, "03000000000000000000000000000000"),
        (
            Reply::Failed("no".into()),
            "040000000200000000000000000000006e6f",
        ),
    ] {
        assert_eq!(hex(&reply.encode()), golden);
    }
}

#[test]
fn a_stream_for_another_machine_or_of_another_version_is_refused() {
    let good = encode_preamble(1 << 20);
    check_preamble(&good, 1 << 20).unwrap();
    assert!(matches!(
        check_preamble(&good, 1 << 21),
        Err(WireError::Ram { .. })
    ));
    let mut newer = good;
    newer[8] = 2;
    assert_eq!(check_preamble(&newer, 1 << 20), Err(WireError::Version(2)));
    let mut other = good;
    other[0] = b'X';
    assert_eq!(
        check_preamble(&other, 1 << 20),
        Err(WireError::NotAMigration)
    );
}

#[test]
fn places_outside_of_the_machine_are_refused() {
    for record in [
        Record::Pages {
            first: 937,
            count: 64,
        },
        Record::Pages {
            first: u64::MAX,
            count: 1,
        },
        Record::Pages {
            first: 0,
            count: 65,
        },
        Record::Pages { first: 0, count: 0 },
        Record::ZeroPages {
            first: 1000,
            count: 1,
        },
        Record::ZeroPages {
            first: 1,
            count: 1000,
        },
        Record::EqualPage {
            page: 0,
            other: 1000,
        },
        Record::PackedPages {
            first: 0,
            count: 1,
            len: 4097,
        },
        Record::PackedPages {
            first: 0,
            count: 1,
            len: 0,
        },
        // Disk 0 takes no writes, and disk 2 does not exist.
        Record::Blocks {
            disk: 0,
            offset: 0,
            len: 512,
        },
        Record::Blocks {
            disk: 2,
            offset: 0,
            len: 512,
        },
        Record::Blocks {
            disk: 1,
            offset: (1 << 20) - 511,
            len: 512,
        },
        Record::Blocks {
            disk: 1,
            offset: u64::MAX,
            len: 512,
        },
        Record::ZeroBlocks {
            disk: 1,
            offset: 1,
            len: 1 << 20,
        },
        Record::State {
            at: 0,
            len: MAX_STATE_PART + 1,
        },
        Record::Abort {
            len: MAX_REASON + 1,
        },
    ] {
        let decoded = Record::decode(&record.encode(), &machine());
        assert!(decoded.is_err(), "{record:?}: {decoded:?}");
    }
}

#[test]
fn a_long_reason_is_cut_between_letters() {
    let reply = Reply::Failed("ä".repeat(MAX_REASON)).encode();
    assert_eq!(reply.len(), REPLY_BYTES + MAX_REASON);
    std::str::from_utf8(&reply[REPLY_BYTES..]).unwrap();
    assert_eq!(printable(b"a\x1b[2J\nb"), "a [2J b");
}

proptest! {
    /// Whatever a header says, what is decoded lies within the machine and has a bounded body.
    #[test]
    fn no_header_leads_out_of_the_machine(
        kind in 0_u32..14, count: u32, at in prop_oneof![0_u64..2000, any::<u64>()],
        more in prop_oneof![0_u64..3, any::<u64>()],
    ) {
        let mut bytes = [0; RECORD_BYTES];
        bytes[..4].copy_from_slice(&kind.to_le_bytes());
        bytes[4..8].copy_from_slice(&count.to_le_bytes());
        bytes[8..16].copy_from_slice(&at.to_le_bytes());
        bytes[16..].copy_from_slice(&more.to_le_bytes());
        if let Ok(record) = Record::decode(&bytes, &machine()) {
            prop_assert!(record.body_len() <= MAX_BODY);
            match record {
                Record::Pages { first, count }
                | Record::PackedPages { first, count, .. }
                | Record::ZeroPages { first, count } => prop_assert!(first + count <= 1000),
                Record::EqualPage { page, other } => prop_assert!(page.max(other) < 1000),
                Record::Blocks { disk, offset, len } => {
                    prop_assert!(disk == 1 && offset + len as u64 <= 1 << 20);
                }
                Record::ZeroBlocks { disk, offset, len } => {
                    prop_assert!(disk == 1 && offset + len <= 1 << 20);
                }
                _ => {}
            }
        }
    }
}
