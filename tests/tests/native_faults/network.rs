//! A network that goes away and comes back.

use std::net::UdpSocket;

use lepton_tests::PATIENCE;
use lepton_tests::metal::Metal;
use lepton_tests::tap::Tap;
use serde_json::json;

/// While its tap is down a guest's frames are lost, counted, and nothing else; then they arrive again.
pub fn a_tap_that_goes_down_and_comes_back() {
    let tap = Tap::new(Some("172.30.45.1/24"));
    let socket = UdpSocket::bind("172.30.45.1:5001").expect("an address of the tap");
    socket.set_read_timeout(Some(PATIENCE)).expect("a socket");
    let arguments = "probe.mode=net_tx probe.size=200 probe.qd=4 probe.seconds=3600 \
                     probe.ip=172.30.45.2 probe.peer=172.30.45.1";
    let metal = Metal::new("LEPTON_PROBE", arguments)
        .with_api()
        .with(|config| {
            config["network-interfaces"] = json!([{
                "iface_id": "n", "host_dev_name": tap.name(), "guest_mac": "06:00:ac:1e:2d:02",
            }]);
        });
    let vmm = metal.start();
    let mut api = vmm.api();
    let mut frame = [0; 2000];
    for _ in 0..3 {
        socket.recv_from(&mut frame).expect("a frame");
        let lost = api.counter("lepton_net_tap_write_fails");
        tap.set_up(false);
        api.wait_for_more("lepton_net_tap_write_fails", lost + 100);
        assert_eq!(api.state(), "Running");
        // What had come before it went down is read first: then the next is of afterwards.
        socket.set_nonblocking(true).expect("a socket");
        while socket.recv_from(&mut frame).is_ok() {}
        socket.set_nonblocking(false).expect("a socket");
        tap.set_up(true);
    }
    socket.recv_from(&mut frame).expect("a frame");
    vmm.terminate();
}
