// A button in each block of code copies its text, without the prompts of a session.
document.querySelectorAll("div.highlight").forEach((block) => {
  const code = block.querySelector("pre");
  if (!code || !navigator.clipboard) return;
  const button = document.createElement("button");
  button.type = "button";
  button.className = "copy";
  button.textContent = "copy";
  button.addEventListener("click", async () => {
    const lines = code.textContent.trimEnd().split("\n");
    const typed = lines.filter((line) => /^(>>>|\.\.\.)/.test(line)).map((line) => line.slice(4));
    await navigator.clipboard.writeText((typed.length ? typed : lines).join("\n") + "\n");
    button.textContent = "copied";
    setTimeout(() => { button.textContent = "copy"; }, 1500);
  });
  block.append(button);
});
