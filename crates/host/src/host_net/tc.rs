//! The netlink messages that attach programs to an interface's traffic control hooks.
//!
//! Each direction has two filters: the program, which decides whether a frame passes, and after it
//! one that drops every frame. So a frame that the program does not accept is dropped, whatever the
//! reason. Source: the Linux kernel's `cls_bpf`.

use rtnetlink::packet_core::DefaultNla;
use rtnetlink::packet_route::RouteNetlinkMessage;
use rtnetlink::packet_route::tc::{TcAttribute, TcFilterBpfOption, TcHandle, TcMessage, TcOption};

use super::guard::{self, Encoded};

/// Attributes of a filter of classic BPF (`TCA_BPF_OPS_LEN`, `TCA_BPF_OPS`), and the flag that a
/// program's answer is an action (`TCA_BPF_FLAG_ACT_DIRECT` of `TCA_BPF_FLAGS`).
const OPS_LEN: u16 = 4;
const OPS: u16 = 5;
const FLAGS: u16 = 8;
const ACT_DIRECT: u32 = 1;

const ALL_PROTOCOLS: u16 = (libc::ETH_P_ALL as u16).to_be();
const HANDLE: TcHandle = TcHandle { major: 0, minor: 1 };

/// A direction, as seen by the host.
#[derive(Clone, Copy, Debug)]
pub(super) enum Hook {
    /// Frames that the host receives from the interface.
    Ingress,
    /// Frames that the host sends to the interface.
    Egress,
}

impl Hook {
    fn parent(self) -> TcHandle {
        TcHandle {
            major: 0xffff,
            minor: match self {
                Self::Ingress => TcHandle::MIN_INGRESS,
                Self::Egress => TcHandle::MIN_EGRESS,
            },
        }
    }
}

/// The message that adds the hooks to an interface. The kernel refuses it if they exist.
pub(super) fn hooks(index: i32) -> RouteNetlinkMessage {
    let mut message = TcMessage::with_index(index);
    message.header.parent = TcHandle::CLSACT;
    message.header.handle = TcHandle {
        major: 0xffff,
        minor: 0,
    };
    message
        .attributes
        .push(TcAttribute::Kind("clsact".to_owned()));
    RouteNetlinkMessage::NewQueueDiscipline(message)
}

/// The messages that set the two filters of a hook. Each replaces the one before in one step.
pub(super) fn filters(index: i32, hook: Hook, program: &Encoded) -> [RouteNetlinkMessage; 2] {
    [
        filter(index, hook, 2, &guard::drop_all(), ACT_DIRECT),
        filter(index, hook, 1, program, 0),
    ]
}

fn filter(
    index: i32,
    hook: Hook,
    priority: u16,
    program: &Encoded,
    flags: u32,
) -> RouteNetlinkMessage {
    let mut message = TcMessage::with_index(index);
    message.header.parent = hook.parent();
    message.header.handle = HANDLE;
    message.header.info = TcHandle {
        major: priority,
        minor: ALL_PROTOCOLS,
    }
    .into();
    let option = |kind, value: Vec<u8>| {
        TcOption::Bpf(TcFilterBpfOption::Other(DefaultNla::new(kind, value)))
    };
    message.attributes = vec![
        TcAttribute::Kind("bpf".to_owned()),
        TcAttribute::Options(vec![
            option(OPS_LEN, (program.count as u16).to_ne_bytes().to_vec()),
            option(OPS, program.bytes.clone()),
            option(FLAGS, flags.to_ne_bytes().to_vec()),
        ]),
    ];
    RouteNetlinkMessage::NewTrafficFilter(message)
}
