//! The header of every vsock packet (VIRTIO 1.3, 5.10.6): 44 bytes, little endian.

/// The header's size in bytes.
pub(super) const HEADER_LEN: usize = 44;

/// The context id of the host, in every guest.
pub(super) const HOST_CID: u64 = 2;

/// `VIRTIO_VSOCK_TYPE_STREAM`, the only socket type served.
pub(super) const TYPE_STREAM: u16 = 1;

/// `VIRTIO_VSOCK_SHUTDOWN_F_RECEIVE`: the sender will receive no more.
pub(super) const SHUTDOWN_RECEIVE: u32 = 1;
/// `VIRTIO_VSOCK_SHUTDOWN_F_SEND`: the sender will send no more.
pub(super) const SHUTDOWN_SEND: u32 = 2;
/// Both directions.
pub(super) const SHUTDOWN_BOTH: u32 = SHUTDOWN_RECEIVE | SHUTDOWN_SEND;

/// `VIRTIO_VSOCK_OP_*`, as numbers: a guest may send any.
pub(super) mod op {
    /// The packet asks for a connection.
    pub(crate) const REQUEST: u16 = 1;
    /// The packet accepts a connection.
    pub(crate) const RESPONSE: u16 = 2;
    /// The packet refuses or ends a connection at once.
    pub(crate) const RST: u16 = 3;
    /// The packet announces the end of one or both directions.
    pub(crate) const SHUTDOWN: u16 = 4;
    /// The packet carries data.
    pub(crate) const RW: u16 = 5;
    /// The packet reports the sender's buffer space.
    pub(crate) const CREDIT_UPDATE: u16 = 6;
    /// The packet asks for the receiver's buffer space.
    pub(crate) const CREDIT_REQUEST: u16 = 7;
}

/// A packet's header, decoded.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Header {
    /// The sender's context id.
    pub(super) src_cid: u64,
    /// The receiver's context id.
    pub(super) dst_cid: u64,
    /// The sender's port.
    pub(super) src_port: u32,
    /// The receiver's port.
    pub(super) dst_port: u32,
    /// Bytes of payload.
    pub(super) len: u32,
    /// The socket type.
    pub(super) socket_type: u16,
    /// The operation, one of [`op`].
    pub(super) op: u16,
    /// The directions that end, for `SHUTDOWN`.
    pub(super) flags: u32,
    /// The sender's receive buffer in bytes.
    pub(super) buf_alloc: u32,
    /// The number of bytes that the sender's user has ever taken, wrapping.
    pub(super) fwd_cnt: u32,
}

impl Header {
    /// Decodes a header. Every bit pattern is valid.
    pub(super) fn decode(bytes: &[u8; HEADER_LEN]) -> Self {
        Self {
            src_cid: u64::from_le_bytes(field(bytes, 0)),
            dst_cid: u64::from_le_bytes(field(bytes, 8)),
            src_port: u32::from_le_bytes(field(bytes, 16)),
            dst_port: u32::from_le_bytes(field(bytes, 20)),
            len: u32::from_le_bytes(field(bytes, 24)),
            socket_type: u16::from_le_bytes(field(bytes, 28)),
            op: u16::from_le_bytes(field(bytes, 30)),
            flags: u32::from_le_bytes(field(bytes, 32)),
            buf_alloc: u32::from_le_bytes(field(bytes, 36)),
            fwd_cnt: u32::from_le_bytes(field(bytes, 40)),
        }
    }

    /// Encodes the header.
    pub(super) fn encode(&self) -> [u8; HEADER_LEN] {
        let mut bytes = [0; HEADER_LEN];
        bytes[0..8].copy_from_slice(&self.src_cid.to_le_bytes());
        bytes[8..16].copy_from_slice(&self.dst_cid.to_le_bytes());
        bytes[16..20].copy_from_slice(&self.src_port.to_le_bytes());
        bytes[20..24].copy_from_slice(&self.dst_port.to_le_bytes());
        bytes[24..28].copy_from_slice(&self.len.to_le_bytes());
        bytes[28..30].copy_from_slice(&self.socket_type.to_le_bytes());
        bytes[30..32].copy_from_slice(&self.op.to_le_bytes());
        bytes[32..36].copy_from_slice(&self.flags.to_le_bytes());
        bytes[36..40].copy_from_slice(&self.buf_alloc.to_le_bytes());
        bytes[40..44].copy_from_slice(&self.fwd_cnt.to_le_bytes());
        bytes
    }

    /// The reset that answers this packet.
    pub(super) fn reset(&self) -> Self {
        Self {
            src_cid: self.dst_cid,
            dst_cid: self.src_cid,
            src_port: self.dst_port,
            dst_port: self.src_port,
            socket_type: self.socket_type,
            op: op::RST,
            ..Self::default()
        }
    }
}

fn field<const N: usize>(bytes: &[u8; HEADER_LEN], at: usize) -> [u8; N] {
    let mut out = [0; N];
    out.copy_from_slice(&bytes[at..at + N]);
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn every_bit_pattern_is_a_header_that_encodes_back(bytes in any::<[u8; 32]>(), tail in any::<[u8; 12]>()) {
            let mut whole = [0; HEADER_LEN];
            whole[..32].copy_from_slice(&bytes);
            whole[32..].copy_from_slice(&tail);
            prop_assert_eq!(Header::decode(&whole).encode(), whole);
        }
    }

    #[test]
    fn fields_lie_where_the_specification_puts_them() {
        let header = Header {
            src_cid: 0x0102_0304_0506_0708,
            dst_cid: HOST_CID,
            src_port: 0x1112_1314,
            dst_port: 0x2122_2324,
            len: 0x3132_3334,
            socket_type: TYPE_STREAM,
            op: op::RW,
            flags: 0x4142_4344,
            buf_alloc: 0x5152_5354,
            fwd_cnt: 0x6162_6364,
        };
        let bytes = header.encode();
        assert_eq!(bytes[..8], [8, 7, 6, 5, 4, 3, 2, 1]);
        assert_eq!(bytes[24..32], [0x34, 0x33, 0x32, 0x31, 1, 0, 5, 0]);
        assert_eq!(bytes[40..], [0x64, 0x63, 0x62, 0x61]);
    }
}
