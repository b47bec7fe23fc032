use std::collections::BTreeMap;

use super::*;

/// A path, and a sender that always has something to send; time goes in steps of 100 µs.
struct Path {
    bytes_per_second: f64,
    round_trip: Duration,
    queue_bytes: f64,
    loss_percent: u64,
    /// Bytes a second of somebody else who fills the queue, and keeps it full.
    others_fill_the_queue: bool,
    model: Model,
    start: Instant,
    now: Duration,
    free_at: Duration,
    in_flight: u64,
    tokens: f64,
    smoothed: Duration,
    chance: u64,
    /// Acknowledgements, and news of losses, by when they arrive.
    due: BTreeMap<(Duration, u64), (Duration, bool)>,
    sent: u64,
    delivered: u64,
    overflowed: u64,
}

const PACKET: u64 = 1452;
const STEP: Duration = Duration::from_micros(100);

impl Path {
    fn new(mbit: f64, round_trip_ms: u64, loss_percent: u64) -> Path {
        let (bytes_per_second, round_trip) = (mbit * 125_000.0, Duration::from_millis(round_trip_ms));
        Path {
            bytes_per_second,
            round_trip,
            queue_bytes: bytes_per_second * round_trip.as_secs_f64(),
            loss_percent,
            others_fill_the_queue: false,
            model: Model::new(1452),
            start: Instant::now(),
            now: Duration::ZERO,
            free_at: Duration::ZERO,
            in_flight: 0,
            tokens: 0.0,
            smoothed: round_trip,
            chance: 1,
            due: BTreeMap::new(),
            sent: 0,
            delivered: 0,
            overflowed: 0,
        }
    }

    fn run(&mut self, seconds: u64) -> f64 {
        let (before, until) = (self.delivered, self.now + Duration::from_secs(seconds));
        while self.now < until {
            self.now += STEP;
            self.acknowledge();
            // As quinn paces.
            let window = self.model.window();
            self.tokens += 1.25 * window as f64 * STEP.as_secs_f64() / self.smoothed.as_secs_f64();
            self.tokens = self.tokens.min((10 * PACKET) as f64);
            while self.tokens >= PACKET as f64 && self.in_flight + PACKET < window {
                self.tokens -= PACKET as f64;
                self.send();
            }
        }
        (self.delivered - before) as f64 / seconds as f64 / self.bytes_per_second
    }

    /// Nothing passes for a while; then a probe that was sent meanwhile is acknowledged.
    fn outage(&mut self, seconds: u64) {
        let probed = self.now + Duration::from_secs(seconds) / 2;
        self.now += Duration::from_secs(seconds);
        self.model.note_sent(self.start + probed);
        let back = self.now + self.round_trip;
        self.in_flight -= self.due.len() as u64 * PACKET;
        self.due.clear();
        self.model.note_outage();
        self.due.insert((back, 0), (probed, true));
        self.in_flight += PACKET;
    }

    fn send(&mut self) {
        self.sent += 1;
        self.in_flight += PACKET;
        self.model.note_sent(self.start + self.now);
        let waits = self.free_at.saturating_sub(self.now).as_secs_f64() * self.bytes_per_second;
        self.chance = self.chance.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        if waits + PACKET as f64 > self.queue_bytes {
            self.overflowed += 1;
            // It is noticed by what is acknowledged after it.
            self.due.insert((self.free_at.max(self.now) + self.round_trip, self.sent), (self.now, false));
            return;
        }
        self.free_at = self.free_at.max(self.now) + Duration::from_secs_f64(PACKET as f64 / self.bytes_per_second);
        let others = if self.others_fill_the_queue { self.queue_bytes / self.bytes_per_second } else { 0.0 };
        let back = self.free_at + self.round_trip + Duration::from_secs_f64(others);
        let arrives = (self.chance >> 33) % 100 >= self.loss_percent;
        self.due.insert((back, self.sent), (self.now, arrives));
    }

    fn acknowledge(&mut self) {
        let mut any = false;
        while let Some((&(at, no), &(sent, arrived))) = self.due.first_key_value()
            && at <= self.now
        {
            self.due.remove(&(at, no));
            self.in_flight -= PACKET;
            if arrived {
                any = true;
                self.delivered += PACKET;
                self.smoothed = self.smoothed * 7 / 8 + (self.now - sent) / 8;
                self.model.note_acked(self.start + self.now, self.start + sent, PACKET);
            } else {
                self.model.note_lost(PACKET);
            }
        }
        if any {
            self.model.note_all_acked(self.start + self.now, false);
        }
    }
}

#[test]
fn a_line_stays_full_whatever_it_loses_and_its_queue_does_not() {
    for (mbit, round_trip_ms) in [(10.0, 20), (100.0, 50), (100.0, 300), (1000.0, 10)] {
        for loss_percent in [0, 1, 5] {
            let mut path = Path::new(mbit, round_trip_ms, loss_percent);
            path.run(5);
            let share = path.run(25);
            let arrives = 1.0 - loss_percent as f64 / 100.0;
            let what = format!(
                "{mbit} Mbit/s, {round_trip_ms} ms, {loss_percent} %: {share:.3} of the line, {} of {} overflowed",
                path.overflowed, path.sent
            );
            println!("{what}, {:?}", path.model.phase);
            assert!(share > 0.97 * arrives && path.overflowed * 100 < path.sent, "{what}");
        }
    }
}

#[test]
fn half_a_second_of_a_usual_line_is_enough_to_find_its_rate() {
    let mut path = Path::new(100.0, 50, 0);
    let share = path.run(1);
    assert!(share > 0.6, "{share} in the first second");
}

#[test]
fn after_an_outage_it_goes_on_as_before() {
    for outage_at in [3, 6, 9, 12] {
        let mut path = Path::new(100.0, 50, 0);
        path.run(outage_at);
        path.outage(6);
        let (overflowed, sent) = (path.overflowed, path.sent);
        let share = path.run(1);
        let lost = (path.overflowed - overflowed) as f64 / (path.sent - sent) as f64;
        (0..9).for_each(|_| path.outage(1));
        path.run(1);
        let later = path.run(1);
        assert!(later > 0.9, "{later} of the line after many outages");
        println!("{outage_at} s: {share:.3} of the line in the first second, {lost:.3} lost, {:?}", path.model.round_trip);
        assert!(share > 0.6 && lost < 0.02, "{share} of the line, {lost} lost");
    }
}

#[test]
fn a_rate_that_changes_is_followed() {
    let mut path = Path::new(100.0, 50, 0);
    path.run(5);
    path.bytes_per_second /= 4.0;
    path.queue_bytes /= 4.0;
    path.run(5);
    let (share, overflowed, sent) = (path.run(10), path.overflowed, path.sent);
    assert!(share > 0.97, "{share} of a line that became slow");
    path.bytes_per_second *= 4.0;
    path.queue_bytes *= 4.0;
    path.run(3);
    let share = path.run(10);
    assert!(share > 0.97, "{share} of a line that became fast");
    assert!(path.overflowed - overflowed < (path.sent - sent) / 100);
}

#[test]
fn a_shallow_queue_is_not_flooded_for_long() {
    for (mbit, round_trip_ms, queue_bytes) in [(100.0, 50, 30_000.0), (1000.0, 20, 212_000.0)] {
        let mut path = Path::new(mbit, round_trip_ms, 0);
        path.queue_bytes = queue_bytes;
        path.run(5);
        let (overflowed, sent) = (path.overflowed, path.sent);
        let share = path.run(20);
        let lost = (path.overflowed - overflowed) as f64 / (path.sent - sent) as f64;
        println!("{mbit} Mbit/s: {share:.3} of the line, {lost:.3} lost, {:?}", path.model.losses);
        assert!(share > 0.8 && lost < 0.04, "{share} of the line, {lost} lost");
    }
}

#[test]
fn others_who_fill_the_queue_do_not_starve_it() {
    let mut path = Path::new(100.0, 50, 0);
    path.run(5);
    path.others_fill_the_queue = true;
    path.run(2);
    let share = path.run(2);
    assert!(path.model.gain == Gain::Wide && share > 0.8, "{share}, {:?}", path.model.gain);
    path.others_fill_the_queue = false;
    path.run(15);
    assert_eq!(path.model.gain, Gain::Normal, "once they are gone it takes no more than it needs");
}
