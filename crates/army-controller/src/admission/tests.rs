//! Reservations, the queue, and bursts over simulated hosts.

use std::time::Duration;

use super::*;

const GIB: u64 = 1 << 30;

fn views() -> Vec<HostView> {
    vec![HostView {
        name: "a".into(),
        open: true,
        suits: true,
        cpus: 1,
        memory_bytes: 10 * GIB,
        available_bytes: 4 * GIB,
        has_template: true,
        ..HostView::default()
    }]
}

fn need(cost_bytes: u64) -> Need {
    Need {
        cost_bytes,
        ..Need::default()
    }
}

/// Places VMs that are expected to take 1 GiB each. A tenth of 10 GiB is kept back, so that there is
/// room for three.
fn place(admission: &Arc<Admission>, count: u32) -> std::result::Result<AdmittedRequest, Refusal> {
    let mut request = admission.admit().unwrap();
    request.place(views(), "t", need(GIB), count)?;
    Ok(request)
}

fn is_estimated(placed: std::result::Result<AdmittedRequest, Refusal>) -> bool {
    matches!(placed.map(drop), Err(Refusal::Estimated(_)))
}

/// Measures the host until all of its VMs count by what they use.
fn measure(admission: &Admission) {
    for _ in 0..2 {
        admission.begin_measurement("a");
        admission.host_measured("a");
    }
}

#[test]
fn a_reservation_holds_until_the_host_is_measured_with_its_vms() {
    let admission = Arc::new(Admission::default());
    let first = place(&admission, 2).unwrap();
    assert!(is_estimated(place(&admission, 2)));
    let second = place(&admission, 1).unwrap();
    // Reservations remain while the host is measured.
    measure(&admission);
    assert!(is_estimated(place(&admission, 1)));
    // The measurement has begun before the VMs were there.
    admission.begin_measurement("a");
    drop(first);
    admission.host_measured("a");
    assert!(is_estimated(place(&admission, 1)));
    // Somebody may have read the figures before this one.
    admission.begin_measurement("a");
    admission.host_measured("a");
    assert!(is_estimated(place(&admission, 1)));
    measure(&admission);
    drop((place(&admission, 2).unwrap(), second));
}

#[test]
fn what_does_not_fit_by_measured_figures_is_refused_for_good() {
    let admission = Arc::new(Admission::default());
    let refused = place(&admission, 4).map(drop).unwrap_err();
    let Refusal::Final(error) = refused else {
        panic!("{refused:?}");
    };
    assert_eq!(
        (error.kind, error.retry_after_s),
        (ErrorKind::Busy, Some(RETRY_S))
    );
}

#[test]
fn vms_that_are_not_measured_count_as_those_of_their_template_that_are() {
    let admission = Arc::new(Admission::default());
    let first = place(&admission, 3).unwrap();
    assert!(is_estimated(place(&admission, 1)));
    // A gibibyte was a guess.
    admission.template_measured("t", GIB / 16);
    let mut request = admission.admit().unwrap();
    let cost = admission.measured_cost("t").unwrap();
    request.place(views(), "t", need(cost), 30).unwrap();
    drop(first);
}

#[test]
fn vms_are_in_creation_while_their_request_lives() {
    let admission = Arc::new(Admission::default());
    let mut request = admission.admit().unwrap();
    request.add_vms(["x".to_owned()].into_iter());
    assert!(admission.vms_in_creation().contains("x"));
    drop(request);
    assert!(admission.vms_in_creation().is_empty());
}

#[test]
fn a_request_beyond_the_limit_is_told_when_to_try_again() {
    let admission = Arc::new(Admission::default());
    let all: Vec<_> = (0..REQUESTS).map(|_| admission.admit().unwrap()).collect();
    let refused = admission.admit().map(drop).unwrap_err();
    assert_eq!(
        (refused.kind, refused.retry_after_s),
        (ErrorKind::Busy, Some(RETRY_S))
    );
    drop(all);
    admission.admit().unwrap();
}

#[tokio::test]
async fn a_host_has_a_number_of_fork_permits_and_does_not_delay_another() {
    let admission = Admission::default();
    let mut permits = Vec::new();
    for _ in 0..FORKS {
        permits.push(admission.fork_permit("a", 1).await.unwrap());
    }
    let soon = Duration::from_millis(20);
    let late = tokio::time::timeout(soon, admission.fork_permit("a", 1)).await;
    assert!(late.is_err(), "there was a permit too many");
    drop(admission.fork_permit("b", 1).await.unwrap());
    permits.pop();
    drop(admission.fork_permit("a", 1).await.unwrap());
}

#[tokio::test]
async fn a_request_without_estimated_room_waits_for_a_measurement_and_not_for_ever() {
    let admission = Arc::new(Admission::default());
    let queue = || Queue {
        template: "t".to_owned(),
        labels: BTreeMap::new(),
    };
    let attempt = || async { Ok(place(&admission, 2)) };
    let first = place(&admission, 2).unwrap();
    drop(first);
    let waiting = admission.place_in_turn(queue(), WAIT, attempt);
    let measured = async {
        tokio::time::sleep(Duration::from_millis(100)).await;
        measure(&admission);
    };
    let (placed, ()) = tokio::join!(waiting, measured);
    let second = placed.unwrap();
    let soon = Duration::from_millis(100);
    let refused = admission.place_in_turn(queue(), soon, attempt).await;
    assert_eq!(refused.map(drop).unwrap_err().kind, ErrorKind::Busy);
    drop(second);
}
