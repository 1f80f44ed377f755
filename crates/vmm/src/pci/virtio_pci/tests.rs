use super::*;
use crate::event_loop::EventLoop;
use crate::irq::testing::RecordingWiring;
use crate::virtio::testing::ram;

/// Remembers what it was called for.
#[derive(Default)]
struct Witness {
    kicks: Vec<u16>,
    events: Vec<u32>,
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
    fn handle_event(&mut self, token: u32, _ready: EventSet) -> Result<(), DeviceError> {
        self.events.push(token);
        Ok(())
    }
    fn pause(&mut self) -> Result<(), DeviceError> {
        Ok(())
    }
    fn resume(&mut self) -> Result<(), DeviceError> {
        Ok(())
    }
    fn reset(&mut self) {}
    fn queues(&self) -> Vec<(u16, &Queue)> {
        Vec::new()
    }
    fn save(&self) -> Result<Vec<u8>, DeviceError> {
        Ok(Vec::new())
    }
}

#[test]
fn a_paused_device_hears_of_its_own_events_but_not_of_kicks() {
    let device = Arc::new(Mutex::new(Witness::default()));
    let mut events = EventLoop::new().unwrap();
    let registrar = events.reserve();
    let wiring = Arc::new(RecordingWiring::default());
    let mut transport =
        VirtioPci::new(device.clone(), 0xC000_0000, wiring, ram(4096), registrar).unwrap();
    transport.activate();

    transport.pause().unwrap();
    transport.kicks[0].write(1).unwrap();
    transport.handle_event(KICK_TOKEN, EventSet::IN);
    transport.handle_event(5, EventSet::IN);
    assert!(transport.kicks[0].read().is_err(), "the kick was read");
    {
        let device = device.lock().unwrap();
        assert_eq!((&*device.kicks, &*device.events), (&[][..], &[5][..]));
    }

    transport.resume().unwrap();
    transport.kicks[0].write(1).unwrap();
    transport.handle_event(KICK_TOKEN, EventSet::IN);
    assert_eq!(device.lock().unwrap().kicks, [0]);
}
