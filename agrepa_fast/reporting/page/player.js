"use strict";
// Each clip has one position that all of its versions share. Keys act on the clip that was used last.

const STEP = 0.5; // seconds of an arrow key
const END = 0.05; // seconds before the end that count as the end

class Clip {
  constructor(element) {
    this.element = element;
    this.versions = [...element.querySelectorAll(".version")];
    this.audios = this.versions.map((version) => version.querySelector("audio"));
    this.seconds = Number(this.audios[0].dataset.seconds);
    this.chosen = 0;
    this.position = 0;
    this.versions.forEach((version, number) => {
      this.audios[number].removeAttribute("controls"); // they serve pages whose scripts do not run
      this.audios[number].addEventListener("ended", () => number === this.chosen && this.stop());
      this.audios[number].addEventListener("pause", () => this.paused(number));
      version.querySelector("button").addEventListener("click", () => this.press(number));
      version.querySelector(".mel").addEventListener("click", (event) => {
        const box = event.currentTarget.getBoundingClientRect();
        this.move(((event.clientX - box.left) / box.width) * this.seconds);
        this.play(number);
      });
    });
  }

  get playing() {
    return this.element.classList.contains("playing");
  }

  now() {
    const audio = this.audios[this.chosen];
    return this.playing ? audio.currentTime : this.position;
  }

  press(number) {
    if (this.playing && number === this.chosen) this.pause();
    else this.play(number);
  }

  play(number) {
    choose(this);
    this.position = this.now();
    if (number !== this.chosen) this.audios[this.chosen].pause();
    this.chosen = number;
    if (!this.playing) requestAnimationFrame(() => draw(this));
    this.element.classList.add("playing");
    this.start(this.audios[number], this.position);
    this.show();
  }

  start(audio, position) {
    for (const one of this.audios) one.preload = "auto"; // so that a switch has no gap
    audio.currentTime = position; // also before its length is known: then it begins there
    audio.play().catch((error) => {
      if (error.name === "AbortError") return; // another version was chosen meanwhile
      this.pause();
      console.error(error);
    });
  }

  pause() {
    this.position = this.now();
    this.element.classList.remove("playing");
    this.audios[this.chosen].pause();
    this.show();
  }

  stop() {
    this.pause();
    this.position = 0;
    this.show();
  }

  paused(number) {
    // By a key of the keyboard or the headphones, or because another program plays. At the end, "ended" follows.
    const audio = this.audios[number];
    if (this.playing && number === this.chosen && audio.paused && !audio.ended) this.pause();
  }

  move(position) {
    const within = Math.max(position, 0);
    if (within > this.seconds - END) return this.stop();
    if (this.playing) this.audios[this.chosen].currentTime = within;
    this.position = within;
    this.show();
  }

  show() {
    const share = Math.min(1, this.now() / this.seconds);
    this.element.style.setProperty("--position", share);
    this.versions.forEach((version, number) => {
      version.classList.toggle("chosen", number === this.chosen);
      version.querySelector("button").setAttribute("aria-pressed", number === this.chosen);
    });
  }
}

const clips = [...document.querySelectorAll(".clip")]
  .filter((element) => element.querySelector(".version"))
  .map((element) => new Clip(element));
let current = null;

function choose(clip) {
  if (current !== clip) {
    if (current && current.playing) current.pause();
    if (current) current.element.classList.remove("current");
    current = clip;
    clip.element.classList.add("current");
  }
}

function draw(clip) {
  if (!clip.playing) return;
  clip.show();
  requestAnimationFrame(() => draw(clip));
}

function neighbour(step) {
  const place = Math.min(Math.max(clips.indexOf(current) + step, 0), clips.length - 1);
  choose(clips[place]);
  clips[place].show();
  clips[place].element.scrollIntoView({ block: "nearest" });
}

document.addEventListener("keydown", (event) => {
  if (clips.length === 0 || event.ctrlKey || event.altKey || event.metaKey || event.shiftKey) return;
  if (event.key === " " && event.target.closest("button, summary, a")) return; // they have a use of their own for it
  if (!current && ["ArrowUp", "ArrowDown"].includes(event.key)) return; // the page scrolls until a clip is in use
  const number = Number.parseInt(event.key, 10) - 1;
  const clip = current || clips[0];
  if (event.key === " ") clip.press(clip.chosen);
  else if (event.key === "ArrowLeft") clip.move(clip.now() - STEP);
  else if (event.key === "ArrowRight") clip.move(clip.now() + STEP);
  else if (event.key === "ArrowUp") neighbour(-1);
  else if (event.key === "ArrowDown") neighbour(1);
  else if (number >= 0 && number < clip.versions.length) clip.play(number);
  else return;
  event.preventDefault();
});
