use std::sync::{Arc, Mutex};

use super::*;
use crate::irq::ioapic::IoapicState;
use crate::irq::testing::RecordingIrqRoutes;

#[derive(Clone, Default)]
struct Paper(Arc<Mutex<Vec<u8>>>);

impl Write for Paper {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.lock().unwrap().extend_from_slice(bytes);
        Ok(bytes.len())
    }
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn port(state: SerialState, paper: &Paper) -> io::Result<Serial> {
    let ioapic = Ioapic::new(
        Arc::new(RecordingIrqRoutes::default()),
        IoapicState::fresh(),
    );
    Serial::new(state, Arc::new(ioapic), 4, Box::new(paper.clone()))
}

#[test]
fn what_the_guest_prints_comes_out() {
    let paper = Paper::default();
    let serial = port(SerialState::fresh(), &paper).unwrap();
    for byte in b"hello" {
        serial.write(0, &[*byte]);
    }
    assert_eq!(*paper.0.lock().unwrap(), b"hello");
}

#[test]
fn input_is_taken_as_far_as_it_fits_and_draining_is_told() {
    let serial = port(SerialState::fresh(), &Paper::default()).unwrap();
    let drained = serial.drained().unwrap();
    let taken = serial.input(&[b'x'; 100]);
    assert!(taken > 0 && taken < 100, "{taken}");
    assert_eq!(serial.input(b"y"), 0);
    for _ in 0..taken {
        let mut byte = [0];
        serial.read(0, &mut byte);
        assert_eq!(byte, [b'x']);
    }
    assert_eq!(drained.read().unwrap(), 1);
}

#[test]
fn more_input_than_the_port_keeps_is_found_before_it_is_restored() {
    for length in [state::INPUT_QUEUE, state::INPUT_QUEUE + 1] {
        let state = SerialState::from(vm_superio::SerialState {
            in_buffer: vec![b'x'; length],
            ..Default::default()
        });
        let fits = state.check().is_ok();
        assert_eq!(port(state, &Paper::default()).is_ok(), fits, "{length}");
        assert_eq!(fits, length == state::INPUT_QUEUE);
    }
}

#[test]
fn unread_input_survives_a_save() {
    let serial = port(SerialState::fresh(), &Paper::default()).unwrap();
    serial.input(b"typed");
    let copy = port(serial.save(), &Paper::default()).unwrap();
    assert_eq!(copy.save(), serial.save());
    let mut byte = [0];
    copy.read(0, &mut byte);
    assert_eq!(byte, [b't']);
}

#[test]
fn a_state_with_too_much_input_is_refused() {
    let state = vm_superio::SerialState {
        in_buffer: vec![0; 1000],
        ..Default::default()
    };
    assert!(port(state.into(), &Paper::default()).is_err());
}

#[test]
fn a_reset_forgets_input_and_registers_but_not_who_listens() {
    let paper = Paper::default();
    let serial = port(SerialState::fresh(), &paper).unwrap();
    let drained = serial.drained().unwrap();
    serial.input(b"typed");
    // Loop-back mode, in which nothing is printed.
    serial.write(4, &[0x10]);
    serial.restore(SerialState::fresh()).unwrap();
    assert_eq!(serial.save(), SerialState::fresh());
    serial.write(0, b"!");
    assert_eq!(*paper.0.lock().unwrap(), b"!");
    // There is room for what waits to be typed.
    assert_eq!(drained.read().unwrap(), 1);
}
