"use strict";
// A listener's answers lie in this browser under the test and the listener's name, until they are saved as a file.

const TEST = JSON.parse(document.getElementById("test").textContent);
const PAIRS = TEST.kind === "pairwise";
const SCALE = [[5, "excellent"], [4, "good"], [3, "fair"], [2, "poor"], [1, "bad"]]; // ITU-T P.800
const CHOICES = [[0, "A is better"], ["same", "no difference"], [1, "B is better"]];
const STORE = `agrepa-listen/${TEST.test}/`;

const byId = (id) => document.getElementById(id);
const players = document.querySelector(".players");
const answers = document.querySelector(".answers");
let state = null; // {listener, started, at, answers: {trial: {answer, plays, seconds}}}
let trials = []; // of this listener, in order: {id, stimuli}
let sounds = []; // of the trial on show: {audio, button, heard}
let shownAt = 0;

function keep(name, value) {
  try {
    localStorage.setItem(STORE + name, value);
  } catch {
    byId("unkept").hidden = false;
  }
}

function kept(name) {
  try {
    return localStorage.getItem(STORE + name);
  } catch {
    return null;
  }
}

function numbers(text) {
  // Numbers from 0 to 1 that the text alone decides on: FNV-1a, then mulberry32.
  let seed = 2166136261;
  for (const byte of new TextEncoder().encode(text)) seed = Math.imul(seed ^ byte, 16777619);
  return () => {
    seed = (seed + 0x6d2b79f5) | 0;
    let mixed = Math.imul(seed ^ (seed >>> 15), 1 | seed);
    mixed = (mixed + Math.imul(mixed ^ (mixed >>> 7), 61 | mixed)) ^ mixed;
    return ((mixed ^ (mixed >>> 14)) >>> 0) / 4294967296;
  };
}

function shuffled(list, draw) {
  const mixed = [...list];
  for (let place = mixed.length - 1; place > 0; place--) {
    const other = Math.floor(draw() * (place + 1));
    [mixed[place], mixed[other]] = [mixed[other], mixed[place]];
  }
  return mixed;
}

function begin(listener) {
  const draw = numbers(`${TEST.seed} ${listener}`);
  trials = shuffled(Object.keys(TEST.trials), draw).map((id) => ({ id, stimuli: shuffled(TEST.trials[id], draw) }));
  const saved = kept(listener);
  state = saved ? JSON.parse(saved) : { listener, started: new Date().toISOString(), at: 0, answers: {} };
  keep("last", listener);
  show();
}

function screen(name) {
  for (const id of ["start", "trial", "end"]) byId(id).hidden = id !== name;
}

function show() {
  silence();
  keep(state.listener, JSON.stringify(state));
  if (state.at >= trials.length) return finish();
  screen("trial");
  shownAt = performance.now();
  const trial = trials[state.at];
  document.querySelector("progress").max = trials.length;
  document.querySelector("progress").value = state.at;
  byId("count").textContent = `${state.at + 1} / ${trials.length}`;
  byId("back").disabled = state.at === 0;
  const known = state.answers[trial.id];
  sounds = trial.stimuli.map((stimulus, place) => {
    const button = document.createElement("button");
    button.type = "button";
    button.append(PAIRS ? "AB"[place] : "Play", document.createElement("i"));
    const sound = { audio: new Audio(TEST.sounds[stimulus]), button, heard: Boolean(known), plays: 0 };
    button.addEventListener("click", () => press(sound));
    sound.audio.addEventListener("ended", () => {
      sound.heard = true;
      update();
    });
    return sound;
  });
  players.replaceChildren(...sounds.map((sound) => sound.button));
  answers.replaceChildren(
    ...(PAIRS ? CHOICES : SCALE).map(([value, word]) => {
      const button = document.createElement("button");
      button.type = "button";
      button.setAttribute("role", "radio");
      const label = document.createElement(PAIRS ? "span" : "small");
      label.textContent = word;
      button.append(...(PAIRS ? [label] : [String(value), label]));
      button.dataset.answer = typeof value === "number" && PAIRS ? trial.stimuli[value] : value;
      button.addEventListener("click", () => answer(PAIRS ? button.dataset.answer : value));
      return button;
    }),
  );
  update();
}

function update() {
  const known = state.answers[trials[state.at].id];
  const heard = sounds.every((sound) => sound.heard);
  for (const sound of sounds) {
    sound.button.classList.toggle("playing", !sound.audio.paused);
    sound.button.classList.toggle("heard", sound.heard);
  }
  for (const button of answers.children) {
    button.disabled = !heard;
    button.setAttribute("aria-checked", Boolean(known) && String(known.answer) === button.dataset.answer);
  }
  byId("next").disabled = !known;
}

function silence() {
  for (const { audio } of sounds) audio.pause();
}

function press(sound) {
  const playing = !sound.audio.paused;
  silence();
  if (!playing) {
    sound.audio.currentTime = 0;
    sound.plays += 1;
    sound.audio.play().then(() => follow(sound), (error) => error.name === "AbortError" || console.error(error));
  }
  update();
}

function follow(sound) {
  sound.button.style.setProperty("--position", sound.audio.currentTime / sound.audio.duration || 0);
  if (sound.audio.paused) update();
  else {
    sound.button.classList.add("playing");
    requestAnimationFrame(() => follow(sound));
  }
}

function answer(value) {
  if (!sounds.every((sound) => sound.heard)) return;
  const seconds = Math.round((performance.now() - shownAt) / 100) / 10;
  state.answers[trials[state.at].id] = { answer: value, plays: sounds.map((sound) => sound.plays), seconds };
  keep(state.listener, JSON.stringify(state));
  update();
}

function step(by) {
  if (by > 0 && !state.answers[trials[state.at].id]) return;
  state.at = Math.max(0, state.at + by);
  show();
}

function saved() {
  const ratings = trials.map(({ id, stimuli }) => ({ trial: id, stimuli, ...state.answers[id] }));
  const { listener, started, ended } = state;
  return JSON.stringify({ format: "agrepa ratings 1", test: TEST.test, kind: TEST.kind, listener, started, ended, ratings }, null, 1);
}

function finish() {
  state.ended ??= new Date().toISOString();
  keep(state.listener, JSON.stringify(state));
  byId("copy").textContent = saved();
  screen("end");
}

byId("save").addEventListener("click", () => {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([saved()], { type: "application/json" }));
  link.download = `ratings-${state.listener.replace(/[^\p{L}\p{N}]+/gu, "-")}.json`;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 60000);
});
byId("another").addEventListener("click", () => {
  keep("last", "");
  byId("listener").value = "";
  screen("start");
});
byId("next").addEventListener("click", () => step(1));
byId("back").addEventListener("click", () => step(-1));
document.querySelector("form").addEventListener("submit", (event) => {
  event.preventDefault();
  const name = byId("listener").value.replace(/[\p{C}\p{Z}]+/gu, " ").trim(); // what can be printed
  if (name) begin(name);
});
document.addEventListener("keydown", (event) => {
  if (byId("trial").hidden || event.ctrlKey || event.altKey || event.metaKey) return;
  const key = event.key.toLowerCase();
  const button = event.target.closest("button");
  if (key === " " && !PAIRS && !button) press(sounds[0]);
  else if (PAIRS && (key === "a" || key === "b")) press(sounds[key === "a" ? 0 : 1]);
  else if (/^[1-5]$/.test(key)) answers.children[PAIRS ? key - 1 : 5 - key]?.click();
  else if (key === "enter" && (!button || answers.contains(button))) step(1);
  else if (key === "arrowleft") step(-1);
  else return;
  event.preventDefault();
});

const last = kept("last");
if (last && kept(last)) begin(last);
