//! A link between two hosts that loses, delays and cuts datagrams: a relay on loopback, between the active and the
//! standby's port.

use std::net::{SocketAddr, UdpSocket};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{self, Receiver, Sender};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use crate::pair::Host;
use crate::seed::Seed;

/// How the link is now; all of it can be changed at any time.
#[derive(Default)]
pub(crate) struct Weather {
    /// Lost in each direction.
    pub(crate) loss_percent: AtomicU64,
    /// In each direction.
    pub(crate) delay_ms: AtomicU64,
    /// The longest payload that passes; 0: any.
    pub(crate) payload_max: AtomicU64,
    /// Nothing passes.
    pub(crate) is_cut: AtomicBool,
    pub(crate) passed: AtomicU64,
    pub(crate) dropped: AtomicU64,
}

pub(crate) struct Relay {
    pub(crate) weather: Arc<Weather>,
    port: u16,
    ends: Arc<AtomicBool>,
}

/// Bytes that wait for the relay's threads.
const BUFFER_BYTES: usize = 16 << 20;

struct Datagram {
    due: Instant,
    bytes: Vec<u8>,
}

impl Relay {
    /// Between whoever sends to its port and the port `to`.
    pub(crate) fn new(to: u16, seed: &mut Seed) -> Relay {
        let bind = || {
            let socket = UdpSocket::bind(("127.0.0.1", 0)).unwrap();
            socket.set_read_timeout(Some(Duration::from_millis(100))).unwrap();
            // What is lost is lost by the weather; without the privilege the system's limit holds.
            let _ = rustix::net::sockopt::set_socket_recv_buffer_size_force(&socket, BUFFER_BYTES);
            Arc::new(socket)
        };
        let (near, far) = (bind(), bind());
        let port = near.local_addr().unwrap().port();
        let (weather, ends) = (Arc::<Weather>::default(), Arc::<AtomicBool>::default());
        // Answers go to where the last datagram came from.
        let client = Arc::new(Mutex::new(None::<SocketAddr>));
        let standby = Arc::new(Mutex::new(Some(SocketAddr::from(([127, 0, 0, 1], to)))));
        let ways = [(&near, &far, Some(client.clone()), standby), (&far, &near, None, client)];
        for (from, onto, learn, target) in ways {
            let (sender, receiver) = mpsc::channel();
            let (from, weather, ends, seed) = (from.clone(), weather.clone(), ends.clone(), Seed::new(seed.next()));
            std::thread::spawn(move || receive(&from, &sender, &weather, &ends, seed, learn.as_deref()));
            let onto = onto.clone();
            std::thread::spawn(move || deliver(&onto, &receiver, &target));
        }
        Relay { weather, port, ends }
    }

    /// Has a host reach its peer through this link.
    pub(crate) fn lead(&self, host: &Host, port: u16) {
        let text = std::fs::read_to_string(host.config()).unwrap();
        let (direct, through) = (format!("127.0.0.1:{port}"), format!("127.0.0.1:{}", self.port));
        assert!(text.contains(&direct), "no {direct} in {text}");
        std::fs::write(host.config(), text.replace(&direct, &through)).unwrap();
    }

    pub(crate) fn cut(&self, is_cut: bool) {
        self.weather.is_cut.store(is_cut, Ordering::Relaxed);
    }

    pub(crate) fn port(&self) -> u16 {
        self.port
    }
}

impl Drop for Relay {
    fn drop(&mut self) {
        self.ends.store(true, Ordering::Relaxed);
    }
}

impl Weather {
    fn passes(&self, len: usize, seed: &mut Seed) -> bool {
        let payload_max = self.payload_max.load(Ordering::Relaxed);
        let is_too_long = payload_max > 0 && len as u64 > payload_max;
        let is_lost = seed.below(100) < self.loss_percent.load(Ordering::Relaxed);
        !(is_too_long || is_lost || self.is_cut.load(Ordering::Relaxed))
    }
}

fn receive(
    from: &UdpSocket,
    sender: &Sender<Datagram>,
    weather: &Weather,
    ends: &AtomicBool,
    mut seed: Seed,
    learn: Option<&Mutex<Option<SocketAddr>>>,
) {
    let mut buffer = vec![0; 65_536];
    while !ends.load(Ordering::Relaxed) {
        let Ok((len, source)) = from.recv_from(&mut buffer) else { continue };
        if let Some(learn) = learn {
            *learn.lock().unwrap() = Some(source);
        }
        if !weather.passes(len, &mut seed) {
            weather.dropped.fetch_add(1, Ordering::Relaxed);
            continue;
        }
        weather.passed.fetch_add(1, Ordering::Relaxed);
        let due = Instant::now() + Duration::from_millis(weather.delay_ms.load(Ordering::Relaxed));
        if sender.send(Datagram { due, bytes: buffer[..len].into() }).is_err() {
            return;
        }
    }
}

/// In order; the delay is the link's, not a wait.
fn deliver(onto: &UdpSocket, receiver: &Receiver<Datagram>, target: &Mutex<Option<SocketAddr>>) {
    for datagram in receiver {
        std::thread::sleep(datagram.due.saturating_duration_since(Instant::now()));
        if let Some(target) = *target.lock().unwrap() {
            let _ = onto.send_to(&datagram.bytes, target);
        }
    }
}
