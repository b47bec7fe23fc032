//! The line itself: what a plain transfer sees of the rate, the distance and the loss that were asked for.

#![allow(clippy::unwrap_used)] // a test that can't go on has failed

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream, UdpSocket};
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use coldspare_sim::line::{FAR, Line, NEAR, Quality};

const PORT: u16 = 7420;

/// `None`, said so, where no line can be made.
fn line(quality: Quality) -> Option<Line> {
    if !Line::is_possible() {
        println!("skipped: needs root and /dev/net/tun");
        return None;
    }
    Some(Line::new(quality, 11).unwrap())
}

/// A UDP socket at each end, connected to each other.
fn sockets(line: &Line) -> (UdpSocket, UdpSocket) {
    let near = line.near().enter(|| UdpSocket::bind((NEAR, PORT))).unwrap();
    let far = line.far().enter(|| UdpSocket::bind((FAR, PORT))).unwrap();
    near.connect((FAR, PORT)).unwrap();
    far.connect((NEAR, PORT)).unwrap();
    // What is lost is lost by the line.
    rustix::net::sockopt::set_socket_recv_buffer_size_force(&far, 16 << 20).unwrap();
    far.set_read_timeout(Some(Duration::from_secs(1))).unwrap();
    near.set_read_timeout(Some(Duration::from_secs(1))).unwrap();
    (near, far)
}

/// Bytes a second of a TCP transfer of `bytes`, from the first byte that arrived to the last.
fn tcp_rate(line: &Line, bytes: usize) -> f64 {
    let listener = line.far().enter(|| TcpListener::bind((FAR, PORT))).unwrap();
    let receiver = std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        let mut buffer = vec![0; 1 << 16];
        stream.read_exact(&mut buffer[..1]).unwrap();
        let start = Instant::now();
        let mut received = 0;
        loop {
            match stream.read(&mut buffer).unwrap() {
                0 => return f64::from(received) / start.elapsed().as_secs_f64(),
                count => received += count as u32,
            }
        }
    });
    line.near()
        .enter(|| {
            let mut stream = TcpStream::connect((FAR, PORT))?;
            stream.write_all(&vec![7; bytes])
        })
        .unwrap();
    receiver.join().unwrap()
}

#[test]
fn tcp_gets_the_rate_and_no_more() {
    let quality = Quality { bits_per_second: 40_000_000, round_trip: Duration::from_millis(20), ..Quality::default() };
    let Some(line) = line(quality) else { return };
    let share = tcp_rate(&line, 12_000_000) * 8.0 / 40e6;
    println!("TCP has {share:.3} of the line");
    assert!((0.7..=1.0).contains(&share), "{share} of the line");
    assert_eq!(line.there().lost.load(Ordering::Relaxed), 0);
}

#[test]
fn a_datagram_takes_the_round_trip() {
    let Some(line) = line(Quality { round_trip: Duration::from_millis(80), ..Quality::default() }) else { return };
    let (near, far) = sockets(&line);
    let echo = std::thread::spawn(move || {
        let mut buffer = [0; 100];
        for _ in 0..10 {
            let len = far.recv(&mut buffer).unwrap();
            far.send(&buffer[..len]).unwrap();
        }
    });
    let mut taken: Vec<Duration> = (0..10)
        .map(|no| {
            let start = Instant::now();
            near.send(&[no; 50]).unwrap();
            assert_eq!(near.recv(&mut [0; 100]).unwrap(), 50);
            start.elapsed()
        })
        .collect();
    echo.join().unwrap();
    taken.sort();
    println!("round trips {taken:?}");
    assert!(taken[0] >= Duration::from_millis(80) && taken[5] < Duration::from_millis(120), "{taken:?}");
}

#[test]
fn so_many_datagrams_are_lost_as_was_asked_for() {
    let Some(line) = line(Quality { loss_ppm: 50_000, round_trip: Duration::from_millis(2), ..Quality::default() }) else { return };
    let (near, far) = sockets(&line);
    far.set_nonblocking(true).unwrap();
    let (mut arrived, mut buffer) = (0, [0; 2000]);
    let mut drain = |arrived: &mut u64| {
        while far.recv(&mut buffer).is_ok() {
            *arrived += 1;
        }
    };
    for no in 0..4000_u32 {
        near.send(&[0; 100]).unwrap();
        if no % 50 == 0 {
            std::thread::sleep(Duration::from_millis(1)); // a pace that no queue feels
        }
        drain(&mut arrived);
    }
    let counts = line.there();
    let deadline = Instant::now() + Duration::from_secs(10);
    while arrived + counts.lost.load(Ordering::Relaxed) < 4000 {
        assert!(Instant::now() < deadline, "{arrived} of 4,000 arrived, {counts:?}");
        drain(&mut arrived);
    }
    assert!((120..280).contains(&(4000 - arrived)), "{} of 4,000 were lost", 4000 - arrived);
    assert_eq!(counts.arrived.load(Ordering::Relaxed), arrived);
}

#[test]
fn nothing_passes_an_outage_a_firewall_or_an_mtu() {
    let Some(line) = line(Quality { round_trip: Duration::from_millis(2), mtu: 1280, ..Quality::default() }) else { return };
    let (near, far) = sockets(&line);
    far.set_read_timeout(Some(Duration::from_millis(300))).unwrap();
    let passes = |len: usize| {
        near.send(&vec![0; len]).unwrap();
        far.recv(&mut [0; 2000]).is_ok()
    };
    assert!(passes(1252));
    line.cut(true);
    assert!(!passes(1252));
    line.cut(false);
    assert!(passes(1252));
    // With IPv4's headers one byte more than the line takes; the sender fragments what it knows to be too long.
    let probe = rustix::net::sockopt::Ipv4PathMtuDiscovery::PROBE;
    rustix::net::sockopt::set_ip_mtu_discover(&near, probe).unwrap();
    assert!(!passes(1253));
    assert_eq!(line.there().too_long.load(Ordering::Relaxed), 1);
    line.change(|quality| quality.blocks_udp = true);
    assert!(!passes(100));
    assert!(tcp_rate(&line, 100_000) > 0.0);
}
