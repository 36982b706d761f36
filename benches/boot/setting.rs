//! What one table is about: who boots, where, and how many at once.

use serde::{Deserialize, Serialize};

/// Who boots.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Play {
    /// A guest in QEMU.
    Guest,
    /// The reads of its recorded boot.
    Replay,
}

/// One table's setting. All boots of one results file have the same.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct Setting {
    /// Of `scripts/guest`, `windows-like`, or the path of a store that has the image `golden`, recorded.
    pub(crate) guest: String,
    /// Of each node's link, in each direction, Mbit/s.
    pub(crate) megabits: u32,
    /// That boot at once.
    pub(crate) nodes: usize,
    pub(crate) play: Play,
    /// Divides the replayed guest's thinking, to stand for a faster processor.
    pub(crate) speed: f64,
    /// Slow motion: links are so many times slower and thinking takes so many times longer, so that one machine's
    /// processors are enough for many nodes. Times are divided by it when they are shown.
    pub(crate) slow: u32,
}

impl Setting {
    pub(crate) fn new(guest: &str, megabits: u32, nodes: usize, play: Play) -> Self {
        Self { guest: guest.to_owned(), megabits, nodes, play, speed: 1.0, slow: 1 }
    }

    /// What divides the thinking on the clock of the machine.
    pub(crate) fn clock_speed(&self) -> f64 {
        match self.play {
            Play::Guest => 1.0,
            Play::Replay => self.speed / f64::from(self.slow),
        }
    }

    /// What the links are shaped to.
    pub(crate) fn clock_megabits(&self) -> u32 {
        (self.megabits / self.slow).max(1)
    }

    pub(crate) fn title(&self) -> String {
        let who = match (self.play, self.nodes) {
            (Play::Guest, 1) => "a real guest".to_owned(),
            (Play::Guest, nodes) => format!("{nodes} real guests at once"),
            (Play::Replay, 1) => "a replayed boot".to_owned(),
            (Play::Replay, nodes) => format!("{nodes} replayed boots at once"),
        };
        let speed = if (self.speed - 1.0).abs() < 1e-9 {
            String::new()
        } else {
            format!(", a processor {} times as fast", self.speed)
        };
        let slow = if self.slow == 1 { String::new() } else { format!(", slow motion ÷ {}", self.slow) };
        format!("{}: {who}, {} Mbit/s{speed}{slow}", self.guest_name(), self.megabits)
    }

    /// The name of its results file.
    pub(crate) fn key(&self) -> String {
        let play = if self.play == Play::Guest { "guest" } else { "replay" };
        let mut key = format!("{}-{play}-{}-{}", self.guest_name(), self.nodes, self.megabits);
        if (self.speed - 1.0).abs() > 1e-9 {
            key.push_str(&format!("-speed{}", self.speed));
        }
        if self.slow > 1 {
            key.push_str(&format!("-slow{}", self.slow));
        }
        key
    }

    fn guest_name(&self) -> &str {
        let path = self.guest.trim_end_matches("/store");
        path.rsplit('/').next().unwrap_or(path)
    }
}
