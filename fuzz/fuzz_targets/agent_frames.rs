//! What arrives from a guest's agent, and from whoever talks to the agent: frames and messages, in
//! pieces.
#![no_main]

use agent_proto::exec::OutputCursors;
use agent_proto::frame::{Decoder, encode};
use agent_proto::incoming::Incoming;
use agent_proto::messages::{FromAgent, FromHost};

libfuzzer_sys::fuzz_target!(|pieces: Vec<&[u8]>| {
    let (mut agent, mut host) = (Decoder::default(), Decoder::default());
    let (mut incoming, mut cursors) = (Incoming::default(), OutputCursors::default());
    for piece in pieces {
        incoming.push(piece);
        while let Ok(Some(message)) = incoming.next() {
            let _ = cursors.event(message);
            let _ = cursors.acknowledgement();
        }
        agent.push(piece);
        while let Ok(Some(message)) = agent.next::<FromAgent>() {
            // What was understood can be said again.
            encode(&message, &mut Vec::new()).expect("a message that fits");
        }
        host.push(piece);
        while let Ok(Some(message)) = host.next::<FromHost>() {
            encode(&message, &mut Vec::new()).expect("a message that fits");
        }
    }
});
