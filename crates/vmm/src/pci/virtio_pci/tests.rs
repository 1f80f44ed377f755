use super::*;
use crate::event_loop::EventLoop;
use crate::irq::testing::RecordingIrqRoutes;
use crate::virtio::testing::ram;

/// Remembers what it was called for.
#[derive(Default)]
struct Witness {
    kicks: Vec<u16>,
    events: Vec<(u32, EventSet)>,
    /// Finds a mistake of its driver when it is resumed.
    is_cheated: bool,
    resets: usize,
    /// Its own state, which is one byte.
    state: u8,
}

impl VirtioDevice for Witness {
    fn name(&self) -> DeviceName {
        DeviceName::new("witness")
    }
    fn device_type(&self) -> u32 {
        19
    }
    fn features(&self) -> u64 {
        0
    }
    fn queue_max_sizes(&self) -> Vec<u16> {
        vec![8]
    }
    fn read_config(&self, _offset: u64, _data: &mut [u8]) {}
    fn activate(&mut self, _activation: Activation) -> Result<(), DeviceError> {
        Ok(())
    }
    fn notify_queue(&mut self, queue: u16) -> Result<(), DeviceError> {
        self.kicks.push(queue);
        Ok(())
    }
    fn handle_event(&mut self, token: u32, ready: EventSet) -> Result<(), DeviceError> {
        self.events.push((token, ready));
        Ok(())
    }
    fn pause(&mut self) -> Result<(), DeviceError> {
        Ok(())
    }
    fn resume(&mut self) -> Result<(), DeviceError> {
        match self.is_cheated {
            true => Err(self.name().driver_error("a mistake")),
            false => Ok(()),
        }
    }
    fn reset(&mut self) {
        self.resets += 1;
    }
    fn queues(&self) -> Vec<(u16, &Queue)> {
        Vec::new()
    }
    fn save(&self) -> Result<Vec<u8>, DeviceError> {
        Ok(vec![self.state])
    }
    fn check_state(&self, state: &[u8]) -> Result<u64, DeviceError> {
        match state {
            [_] => Ok(0),
            _ => Err(self.name().state_error("not one byte")),
        }
    }
    fn restore(&mut self, state: &[u8]) -> Result<(), DeviceError> {
        self.check_state(state)?;
        self.state = state[0];
        Ok(())
    }
}

fn witness() -> (Arc<Mutex<Witness>>, VirtioPci) {
    let device = Arc::new(Mutex::new(Witness::default()));
    let mut events = EventLoop::new().unwrap();
    let registrar = events.reserve();
    let irq_routes = Arc::new(RecordingIrqRoutes::default());
    let mut transport = VirtioPci::new(
        device.clone(),
        0xC000_0000,
        irq_routes,
        ram(4096),
        registrar,
    )
    .unwrap();
    transport.activate();
    (device, transport)
}

#[test]
fn a_paused_device_gets_its_own_events_when_it_is_resumed_and_no_kicks() {
    let (device, mut transport) = witness();
    transport.pause().unwrap();
    transport.kicks[0].write(1).unwrap();
    transport.handle_event(KICK_TOKEN, EventSet::IN);
    transport.handle_event(5, EventSet::IN);
    transport.handle_event(5, EventSet::HANG_UP);
    assert!(transport.kicks[0].read().is_err(), "the kick was read");
    assert!(device.lock().unwrap().events.is_empty());

    transport.resume().unwrap();
    transport.kicks[0].write(1).unwrap();
    transport.handle_event(KICK_TOKEN, EventSet::IN);
    let device = device.lock().unwrap();
    assert_eq!(device.events, [(5, EventSet::IN | EventSet::HANG_UP)]);
    assert_eq!(device.kicks, [0]);
}

#[test]
fn only_a_device_at_rest_is_saved() {
    let (_device, mut transport) = witness();
    assert!(transport.save().is_err());
    transport.pause().unwrap();
    assert!(transport.save().is_ok());
}

#[test]
fn a_driver_whose_mistake_is_found_in_a_resume_breaks_its_device_only() {
    let (device, mut transport) = witness();
    transport.pause().unwrap();
    device.lock().unwrap().is_cheated = true;
    transport.resume().expect("the machine goes on");
    transport.handle_event(5, EventSet::IN);
    assert!(device.lock().unwrap().events.is_empty(), "it is broken");
}

#[test]
fn a_device_that_has_run_is_put_back_and_forgets_its_driver() {
    let (device, mut transport) = witness();
    transport.stop();
    let idle = transport.save().unwrap();
    transport.activate();
    device.lock().unwrap().state = 7;
    transport.kicks[0].write(1).unwrap();
    transport.pause().unwrap();
    transport.restore(&idle).unwrap();
    assert_eq!(transport.save().unwrap(), idle);
    transport.resume().unwrap();
    transport.handle_event(5, EventSet::IN);
    let device = device.lock().unwrap();
    assert_eq!((device.state, device.resets), (0, 2));
    assert!(device.events.is_empty(), "no driver uses it");
}

#[test]
fn a_state_that_does_not_fit_leaves_the_device_as_it_is() {
    let (device, mut transport) = witness();
    transport.pause().unwrap();
    device.lock().unwrap().state = 7;
    let fits = transport.save().unwrap();
    let mut other_device = fits.clone();
    other_device.device_type = 18;
    let mut other_state = fits.clone();
    other_state.device = vec![1, 2];
    let mut other_vectors = fits.clone();
    other_vectors.common.config_vector = 9;
    for wrong in [other_device, other_state, other_vectors] {
        assert!(transport.restore(&wrong).is_err());
        assert_eq!(transport.save().unwrap(), fits);
    }
    assert_eq!(device.lock().unwrap().resets, 0);
}
