// Plots as files: what the page shows in light colours, on white, whatever the reader's theme.
function lightPlot(svg) {
  const copy = svg.cloneNode(true), [, , width, height] = svg.getAttribute("viewBox").split(" ").map(Number);
  const paper = document.createElementNS(svg.namespaceURI, "rect");
  for (const [name, value] of Object.entries({ width, height, fill: "#fff" })) paper.setAttribute(name, value);
  const style = copy.querySelector("style");
  style.textContent = style.textContent.replaceAll("(prefers-color-scheme:dark)", "not all");
  style.after(paper);
  copy.setAttribute("width", width);
  copy.setAttribute("height", height);
  return { text: new XMLSerializer().serializeToString(copy), width, height };
}

function save(name, address) {
  const link = document.createElement("a");
  link.download = name;
  link.href = address;
  link.click();
}

const addressOf = (text) => "data:image/svg+xml;charset=utf-8," + encodeURIComponent(text);

function saveImage(name, plot) {
  const image = new Image(), canvas = document.createElement("canvas"), scale = 2;
  canvas.width = scale * plot.width;
  canvas.height = scale * plot.height;
  image.onload = () => {
    canvas.getContext("2d").drawImage(image, 0, 0, canvas.width, canvas.height);
    save(name, canvas.toDataURL("image/png"));
  };
  image.src = addressOf(plot.text);
}

for (const button of document.querySelectorAll("[data-save]")) {
  button.hidden = false;
  button.addEventListener("click", () => {
    const plot = lightPlot(button.closest("figure").querySelector("svg.plot")), name = button.dataset.name;
    if (button.dataset.save === "svg") save(name + ".svg", addressOf(plot.text));
    else saveImage(name + ".png", plot);
  });
}
